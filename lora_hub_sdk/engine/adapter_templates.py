"""The chat templates that adapters bring: used where they are asked for, else only mentioned."""

from __future__ import annotations

import logging
from pathlib import Path

from lora_hub_sdk.engine.prompt import Template
from lora_hub_sdk.errors import AdmissionError, UnsupportedRouteError
from lora_hub_sdk.registry.adapter_tokens import own_template
from lora_hub_sdk.types import Adapter, Route

_log = logging.getLogger(__name__)


class AdapterTemplates:
    """Reads each adapter's files once. Safe to share between threads.

    Args:
        usual: the base's own chat template.
    """

    def __init__(self, usual: object) -> None:
        self._usual = usual
        self._found: dict[tuple[Path, str], str | None] = {}

    def of(self, route: Route, template: Template) -> str | None:
        """The chat template of the route's first adapter where ``template`` is "adapter", else None.

        With "auto" an adapter that was trained with another chat template than the base's is told of in the log, once.

        Raises:
            UnsupportedRouteError: adapters with different ones.
            AdmissionError: files that cannot be read, with "adapter" alone.
        """
        if template not in ("auto", "adapter"):
            return None
        own = [(member.adapter.name, self._read(member.adapter, template)) for member in route.members]
        if template == "auto" or not own:
            return None
        found = {name: text for name, text in own if text is not None}
        if len(set(found.values())) > 1:
            raise UnsupportedRouteError(
                f"template='adapter': the adapters {', '.join(map(repr, found))} bring different chat templates, and a "
                "prompt has one; select one of them, or use another template"
            )
        return own[0][1]

    def _read(self, adapter: Adapter, template: Template) -> str | None:
        key = (adapter.folder, adapter.revision)
        if key in self._found:
            return self._found[key]
        try:
            text = own_template(adapter.folder, adapter.name)
        except AdmissionError:
            if template == "adapter":
                raise
            text = None
        if text is not None and _same(text, self._usual):
            text = None
        if adapter.folder.is_dir():
            self._found[key] = text
        if text is not None and template == "auto":
            _log.warning(
                "adapter %r brings a chat template of its own, which template='auto' does not use; template='adapter' "
                "does",
                adapter.name,
            )
        return text


def _same(text: str, usual: object) -> bool:
    return isinstance(usual, str) and text.strip() == usual.strip()
