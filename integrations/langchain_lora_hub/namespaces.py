"""Whose adapters a call may use: the namespace of its configuration, or that of the run that it is part of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.runnables import RunnableConfig, ensure_config


def configured_namespace(config: RunnableConfig | None = None) -> Any:
    """None where neither the call's configuration nor that of the run around it names one.

    A function within a chain, and an agent, call models without a configuration, or with another one.
    """
    own = (config or {}).get("configurable", {}).get("namespace")
    return ensure_config().get("configurable", {}).get("namespace") if own is None else own


def with_namespace(config: RunnableConfig | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a call, with the configured namespace, unless they set one themselves."""
    namespace = configured_namespace(config)
    return dict(given) if namespace is None else {"namespace": namespace, **given}
