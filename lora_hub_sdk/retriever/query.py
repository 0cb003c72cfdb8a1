"""What a search may be asked. Pure, so that every door can check before any work is done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lora_hub_sdk.errors import ConfigurationError, EmptyPromptError
from lora_hub_sdk.registry.naming import can_be_stored


def check_k(k: object) -> None:
    """Refuse a number of adapters that no search can give.

    Raises:
        ConfigurationError: k is not a whole number of 1 or more.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ConfigurationError(f"k={k!r}: expected a whole number of 1 or more")


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuse prompts that say nothing: no adapter can be nearest to them.

    Raises:
        EmptyPromptError: names the first such prompt's place.
        ConfigurationError: one text, whose letters would be taken for prompts.
    """
    if isinstance(prompts, str):
        raise ConfigurationError("prompts is one text, expected a list of them: [prompt]")
    for row, prompt in enumerate(prompts):
        if not prompt.strip():
            raise EmptyPromptError(row)


def names_of(what: str, values: Iterable[str]) -> tuple[str, ...]:
    """Names that were given as a list, without repetitions.

    Raises:
        ConfigurationError: one text, whose letters would be taken for names, or something that is no text.
    """
    if isinstance(values, str):
        raise ConfigurationError(f"{what}={values!r} is one text, expected a list of them: [{values!r}]")
    names = tuple(dict.fromkeys(values))
    for name in names:
        if not isinstance(name, str) or not name.strip() or not can_be_stored(name):
            raise ConfigurationError(f"{what}: expected texts, found {name!r}")
    return names
