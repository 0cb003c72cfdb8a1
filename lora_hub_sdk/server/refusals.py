"""What is told to a client whose request is not answered: a status, and OpenAI's form of an error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from lora_hub_sdk.server.json_bytes import json_bytes


@dataclass(frozen=True, slots=True)
class Refusal:
    """A status, and the fields of OpenAI's error.

    ``message``, ``code`` and ``param`` are read by strangers: no paths, no tracebacks, nothing of other namespaces.

    Attributes:
        kind: OpenAI's ``error.type``.
        code: a short word for programs.
        param: the field of the body that is at fault.
        retry_after_s: when to come again.
    """

    status: int
    message: str
    kind: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's form of it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Response:
        """What is sent."""
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status in (408, 413):
            # What is still sent of the body is not read.
            headers["connection"] = "close"
        return Response(json_bytes(self.body), self.status, headers, "application/json")


class Refused(Exception):  # noqa: N818  # what a client did is no error of ours
    """Ends a request with a refusal."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal
