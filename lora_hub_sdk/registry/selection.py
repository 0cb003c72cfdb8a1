"""From a filter to SQL: which adapters a caller may see."""

from __future__ import annotations

from typing import Final

from sqlalchemy import ColumnElement, exists, func
from sqlalchemy.orm import aliased

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.registry.tables import AdapterRow, RevisionRow, ScoreRow, TagRow
from lora_hub_sdk.types import TRUST, AdapterFilter, Trust

#: Under a name of its own, since the query around it may ask for the current revision too.
_CURRENT: Final = aliased(RevisionRow)
_ORDER: Final[tuple[Trust, ...]] = ("low", "medium", "high")


def visible(allowed: AdapterFilter) -> list[ColumnElement[bool]]:
    """The conditions on ``adapters`` of a filter, ``exclude`` left out; retired adapters are never visible.

    Raises:
        ConfigurationError: a degree of trust that there is not.
    """
    if allowed.min_trust not in _ORDER:
        raise ConfigurationError(f"min_trust={allowed.min_trust!r}: expected one of {', '.join(_ORDER)}")
    conditions = [AdapterRow.state == "active", AdapterRow.namespace == allowed.namespace]
    if allowed.base_model is not None:
        conditions.append(AdapterRow.base_model == allowed.base_model)
    if allowed.bases:
        conditions.append(AdapterRow.base_model.in_(allowed.bases))
    return [*conditions, *_narrowing(allowed)]


def is_narrow(allowed: AdapterFilter) -> bool:
    """Whether the filter asks for more than the index knows by itself, namespace and base model."""
    return bool(allowed.tags or allowed.licenses or allowed.scores or allowed.min_trust != "low" or allowed.bases)


def _narrowing(allowed: AdapterFilter) -> list[ColumnElement[bool]]:
    is_current = (_CURRENT.adapter_id == AdapterRow.id) & _CURRENT.current
    conditions: list[ColumnElement[bool]] = []
    if allowed.min_trust != "low":
        enough = _ORDER[_ORDER.index(allowed.min_trust) :]
        origins = [origin for origin, trust in TRUST.items() if trust in enough]
        conditions.append(AdapterRow.origin.in_(origins))
    if allowed.licenses:
        licenses = [name.lower() for name in allowed.licenses]
        conditions.append(exists().where(is_current, func.lower(_CURRENT.license).in_(licenses)))
    conditions += [exists().where(TagRow.adapter_id == AdapterRow.id, TagRow.tag == tag) for tag in allowed.tags]
    for wanted in allowed.scores:
        conditions.append(
            exists().where(
                is_current,
                ScoreRow.adapter_id == AdapterRow.id,
                ScoreRow.digest == _CURRENT.digest,
                ScoreRow.task == wanted.task,
                ScoreRow.metric == wanted.metric,
                ScoreRow.value >= wanted.value,
            )
        )
    return conditions
