"""The systems by name: "mixture", "mixture@5" with five adapters, "mixture-ood" without the task's own one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.experts import FixedExperts
from lora_hub_sdk.evaluation.gated import RetrievedGate
from lora_hub_sdk.evaluation.lorahub import LoraHubSearch
from lora_hub_sdk.evaluation.retrieved import Base, Perfect, Retrieved
from lora_hub_sdk.evaluation.soup import AdapterSoup

if TYPE_CHECKING:
    from lora_hub_sdk.evaluation.system import System

#: How many adapters a system takes where its name says nothing, as in the paper.
K: Final = 3
_OOD: Final = "-ood"
_NAME: Final = re.compile(r"(?P<plain>[a-z0-9-]+?)(?P<ood>-ood)?(@(?P<k>[1-9][0-9]*))?")

#: From the whole name, k, and whether the own adapter is left out.
_Maker = Callable[[str, int, bool], "System"]


@dataclass(frozen=True, slots=True)
class _Kind:
    """``takes_k``: whether "@k" may follow the name; ``masks``: whether there is one with "-ood"."""

    told: str
    make: _Maker
    takes_k: bool = False
    masks: bool = False


def _lorauter(name: str, k: int, ood: bool) -> System:
    from lora_hub_sdk.evaluation.lorauter import lorauter_system

    return lorauter_system(name, k, ood)


def _retrieved(told: str, strategy: str, weights: str = "uniform", *, takes_k: bool = True) -> _Kind:
    return _Kind(told, lambda name, k, ood: Retrieved(name, strategy, k, weights, ood), takes_k, masks=True)


def _experts(told: str) -> _Kind:
    return _Kind(told, lambda name, k, ood: FixedExperts(name))


_KINDS: Final[Mapping[str, _Kind]] = {
    "base": _Kind("the base model alone", lambda name, k, ood: Base(name)),
    "perfect": _Kind(
        "each task's own adapter, as if the task were told (paper 5.1, perfect selection)",
        lambda name, k, ood: Perfect(name),
    ),
    "selection": _retrieved("the nearest adapter (paper 4.2)", "selection", takes_k=False),
    "fusion": _retrieved("the nearest 3, their A and their B averaged (paper 4.2, equation 4)", "fusion"),
    "mixture": _retrieved("the nearest 3, their outputs averaged (paper 4.2)", "mixture"),
    "similarity": _retrieved(
        "the nearest 3, their outputs weighed by softmax(cosine / 0.2) (arXiv 2601.21795)", "mixture", "similarity"
    ),
    "gate": _retrieved(
        "the nearest 3, their outputs weighed by cosine and shared words as fit_weights learned, sparsely",
        "mixture",
        "gate",
    ),
    "fitted": _retrieved(
        "the nearest 3, their outputs weighed by softmax(cosine / t), the t as fit_weights learned", "mixture", "fitted"
    ),
    "sparse": _retrieved(
        "the nearest 3, their outputs weighed by 1.5-entmax of the cosine, as fit_weights learned", "mixture", "sparse"
    ),
    "moe-top1": _experts(
        "one expert a cluster, one of them for each token and module by a linear router (paper 5.1, MoE top 1)"
    ),
    "moe-top3": _experts(
        "one expert a cluster, three of them for each token and module by a linear router (paper 5.1, MoE top 3)"
    ),
    "moe-soft": _experts(
        "one expert a cluster, all weighed for each token and module by a linear router (paper 5.1, MoE soft)"
    ),
    "smear": _experts(
        "one expert a cluster, A and B averaged for each prompt and module by a linear router (arXiv 2306.03745)"
    ),
    "adaptersoup": _Kind(
        "the 3 nearest to the training rows of all tasks, A and B averaged, for every prompt (arXiv 2302.07027)",
        lambda name, k, ood: AdapterSoup(name, k),
        takes_k=True,
    ),
    "lorahub": _Kind(
        "20 random adapters for each task, A and B weighed by a search on 20 of its rows (arXiv 2307.13269)",
        lambda name, k, ood: LoraHubSearch(name),
    ),
    "lorahub-mix": _Kind(
        "as lorahub, by one search on 64 rows of all tasks, for every prompt",
        lambda name, k, ood: LoraHubSearch(name, mixed=True, rows=64),
    ),
    "ramole": _Kind(
        "the nearest 3, their outputs weighed for each token and module by a trained gate (arXiv 2406.16989)",
        lambda name, k, ood: RetrievedGate(name, k, ood),
        takes_k=True,
        masks=True,
    ),
    "lorauter": _Kind(
        "the 3 nearest tasks by their rows, of each the adapter that scored best there, their outputs weighed by "
        "softmax(cosine / 0.2) (arXiv 2601.21795)",
        _lorauter,
        takes_k=True,
        masks=True,
    ),
    "arrow": _experts(
        "the whole pool, 3 adapters for each token and module by what each of them reads most (arXiv 2405.11157)"
    ),
}
#: Those of the table, in its order.
SYSTEMS: Final = (
    "base",
    "perfect",
    "selection",
    "fusion",
    "mixture",
    "similarity",
    "gate",
    "selection-ood",
    "fusion-ood",
    "mixture-ood",
    "similarity-ood",
    "gate-ood",
    "moe-top1",
    "moe-top3",
    "moe-soft",
    "smear",
    "adaptersoup",
    "lorahub",
    "ramole",
    "ramole-ood",
    "lorauter",
    "lorauter-ood",
    "arrow",
)


def _descriptions() -> dict[str, str]:
    told = {name: kind.told for name, kind in _KINDS.items()}
    told |= {
        name + _OOD: f"as {name}, with the task's own adapter left out of the search (paper 5, OOD)"
        for name, kind in _KINDS.items()
        if kind.masks
    }
    order = [*SYSTEMS, *(name for name in told if name not in SYSTEMS)]
    return {name: told[name] for name in order}


#: What each system is and where it comes from; first those of the table.
DESCRIPTIONS: Final[Mapping[str, str]] = _descriptions()


def system(name: str) -> System:
    """The system of that name; see ``DESCRIPTIONS``.

    Args:
        name: one of ``DESCRIPTIONS``. "@k" behind it gives another number of adapters than 3 to those that retrieve
            several, to AdapterSoup and to LoRAuter.

    Raises:
        ConfigurationError: a name of no system, with those that there are; or "@k" where there is no k.
    """
    found = _NAME.fullmatch(name) if isinstance(name, str) else None
    kind = _KINDS.get(found["plain"]) if found else None
    if found is None or kind is None or (found["ood"] and not kind.masks):
        raise ConfigurationError(f"system {name!r} is unknown; choose among {', '.join(DESCRIPTIONS)}")
    if found["k"] and not kind.takes_k:
        raise ConfigurationError(
            f"system {name!r}: {found['plain']} takes no number of adapters; those that do are "
            f"{', '.join(plain for plain, one in _KINDS.items() if one.takes_k)}"
        )
    return kind.make(name, int(found["k"] or K), bool(found["ood"]))
