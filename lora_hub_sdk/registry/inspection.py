"""What an adapter's files are like and why they would be refused, without refusing: the policy of admission, told."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_hub_sdk.errors import (
    AdmissionError,
    InvalidConfigError,
    MissingConfigError,
    MissingWeightsError,
    NoEffectError,
    NonFiniteWeightsError,
    OutOfBoundsError,
    ShapeMismatchError,
    UnsupportedFeatureError,
)
from lora_hub_sdk.registry.admission import Examination, Limits, short_names
from lora_hub_sdk.registry.layout import BaseLayout

#: The checks in the order of the policy.
_CHECKS: Final = ("files", "configuration", "features", "tensors", "shapes", "finite", "bounds", "effect")
#: The check that an error belongs to; all others are about the tensors.
_CHECK_OF: Final[tuple[tuple[type[AdmissionError], str], ...]] = (
    (MissingConfigError, "files"),
    (MissingWeightsError, "files"),
    (InvalidConfigError, "configuration"),
    (UnsupportedFeatureError, "features"),
    (ShapeMismatchError, "shapes"),
    (NonFiniteWeightsError, "finite"),
    (OutOfBoundsError, "bounds"),
    (NoEffectError, "effect"),
)


@dataclass(frozen=True, slots=True)
class Check:
    """One step of the policy. ``passed`` is None where an earlier step, or a bound met early, ended the way."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """The verdict on an adapter's files, and what could be read of them until then; None is what could not.

    ``repo_id`` and ``revision`` are those of ``Pulled``. ``rank`` is the largest of any module that has factors, as
    configured, ``modules`` their count, ``target_modules`` their short names and those of the saved modules;
    ``delta_norm_*`` are Frobenius norms of s * B A over the modules. ``dataclasses.asdict`` gives plain JSON.
    """

    accepted: bool
    error: str | None
    message: str | None
    checks: tuple[Check, ...]
    base_model: str | None
    rank: int | None
    alpha: float | None
    use_rslora: bool | None
    modules: int | None
    target_modules: tuple[str, ...]
    tensors: int | None
    dtypes: tuple[str, ...]
    parameters: int | None
    size_bytes: int | None
    digest: str | None
    delta_norm_min: float | None
    delta_norm_median: float | None
    delta_norm_max: float | None
    repo_id: str = ""
    revision: str = ""


def inspect_adapter(
    folder: Path,
    *,
    source: str,
    layout: BaseLayout,
    limits: Limits | None = None,
    pickle_files: tuple[str, ...] = (),
) -> Inspection:
    """Examine an adapter's files as ``admit`` does, with the same verdict, and tell all that was seen.

    Never raises AdmissionError; never loads the base model's weights.

    Args:
        layout: the base model's.
        pickle_files: names of pickled weights seen beside, for a telling message.
    """
    seen = Examination(folder, source, layout, limits or Limits(), pickle_files)
    error: AdmissionError | None = None
    try:
        seen.run()
    except AdmissionError as refusal:
        error = refusal
    config = seen.config
    norms = [norm for norm in seen.norms.values() if math.isfinite(norm)]
    ranks = None if config is None else [config.rank(module) for module in seen.modules] or [config.r]
    return Inspection(
        accepted=error is None,
        error=None if error is None else type(error).__name__,
        message=None if error is None else str(error),
        checks=_checks(seen, error),
        base_model=None if config is None else config.base_model,
        rank=None if ranks is None else max(ranks),
        alpha=None if config is None else config.alpha,
        use_rslora=None if config is None else config.use_rslora,
        modules=len(seen.modules) or None,
        target_modules=short_names((*seen.modules, *seen.saved)),
        tensors=seen.tensors,
        dtypes=seen.dtypes,
        parameters=seen.parameters,
        size_bytes=seen.size_bytes,
        digest=seen.digest,
        delta_norm_min=min(norms, default=None),
        delta_norm_median=statistics.median(norms) if norms else None,
        delta_norm_max=max(norms, default=None),
    )


def _checks(seen: Examination, error: AdmissionError | None) -> tuple[Check, ...]:
    checks = {name: Check(name, True if name in seen.passed else None, seen.passed.get(name, "")) for name in _CHECKS}
    if error is not None:
        failed = next((name for kind, name in _CHECK_OF if isinstance(error, kind)), "tensors")
        checks[failed] = Check(failed, False, error.problem)
    return tuple(checks.values())
