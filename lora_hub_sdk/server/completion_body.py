"""The body of ``POST /v1/completions``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lora_hub_sdk.server.fields import Answered, Count, One, Zero


class CompletionBody(Answered):
    """Prompts as they are."""

    prompt: Annotated[
        str | Annotated[list[str], Field(min_length=1)], Field(description="Texts; token ids are not read.")
    ]
    max_tokens: Count | None = None
    best_of: One | None = None
    echo: Literal[False] | None = None
    logprobs: Zero | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str]:
        """Always several."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def longest(self) -> int | None:
        """The most tokens of an answer, where that was said."""
        return self.max_tokens
