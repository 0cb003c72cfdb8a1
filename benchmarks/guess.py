"""What a guessed vector is worth: each real adapter is left out, guessed from the others, and searched for.

The others keep the vectors of their samples. Each adapter's own test prompts search among all of them; ``stolen`` is
the share of other domains' prompts that the guess attracts. ``other seeds`` allows only neighbours whose training began
with another random A, as it would in the wild: many adapters of this collection share one.

    python -m benchmarks.guess
    python -m benchmarks.guess --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._report import machine
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.registry._card import read_card
from lora_hub_sdk.retriever.encoder import SentenceEncoder, mean_vector
from lora_hub_sdk.retriever.guess import described, guess_vector

_SHARED = Path(__file__).resolve().parents[2] / "shared"
_ROWS = 20
#: Mean cosine of the two A of a module above which two trainings are taken to have begun with the same one.
_SAME_SEED = 0.5
Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Score:
    """Percent over all test prompts of all adapters that were left out; ``cosine`` to the vector of its samples."""

    guess: str
    top1: float
    top3: float
    domain: float
    stolen: float
    cosine: float


@dataclass(frozen=True)
class _Pool:
    """n adapters: ``vectors`` (n, d) of their samples, ``prompts`` (n, 20, d) of their test rows."""

    folders: Sequence[Path]
    domains: Sequence[str]
    texts: Sequence[str]
    vectors: Array
    prompts: Array
    encoder: SentenceEncoder

    def without(self, place: int, allowed: Sequence[int]) -> list[tuple[Path, Array]]:
        return [(self.folders[other], self.vectors[other]) for other in allowed if other != place]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if not (_SHARED / "adapters").is_dir():
        print("skipped: the real adapters and their test rows are not beside this checkout")
        return
    pool = _load()
    scores = [_score(pool, name, guess) for name, guess in _guesses(pool).items()]
    if options.json:
        print(json.dumps({"machine": machine(), "adapters": len(pool.folders), "guesses": [*map(asdict, scores)]}))
    else:
        _show(scores)


def _load() -> _Pool:
    folders = sorted(path.parent for path in (_SHARED / "adapters").glob("*/adapter_model.safetensors"))
    encoder = SentenceEncoder(resolve_model("all-minilm-l6-v2"))
    return _Pool(
        folders=folders,
        domains=[json.loads((folder / "training.json").read_text())["domain"] for folder in folders],
        texts=[described(folder.name, read_card(folder / "README.md").summary) for folder in folders],
        vectors=np.stack([mean_vector(encoder.encode(_inputs(folder.name, "train"))) for folder in folders]),
        prompts=np.stack([encoder.encode(_inputs(folder.name, "test")) for folder in folders]),
        encoder=encoder,
    )


def _inputs(task: str, part: str) -> list[str]:
    lines = (_SHARED / "data" / "tasks" / f"{task}.{part}.jsonl").read_text("utf-8").split("\n")
    return [json.loads(line)["inputs"] for line in lines[:_ROWS]]


def _guesses(pool: _Pool) -> dict[str, Callable[[int], Array]]:
    everyone = range(len(pool.folders))
    strangers = _strangers(pool.folders)

    def guess(place: int, allowed: Sequence[int], *, text: bool, weights: bool) -> Array:
        return guess_vector(
            pool.encoder,
            text=pool.texts[place] if text else "",
            weights=pool.folders[place] if weights else None,
            known=pool.without(place, allowed),
            source=pool.folders[place].name,
        )

    def mean(place: int) -> Array:
        return mean_vector(np.delete(pool.vectors, place, axis=0))

    return {
        "its own samples": lambda place: pool.vectors[place],
        "mean of the others": mean,
        "its text's own vector": lambda place: guess(place, (), text=True, weights=False),
        "text": lambda place: guess(place, everyone, text=True, weights=False),
        "weights": lambda place: guess(place, everyone, text=False, weights=True),
        "text and weights": lambda place: guess(place, everyone, text=True, weights=True),
        "text, other seeds": lambda place: guess(place, strangers[place], text=True, weights=False),
        "weights, other seeds": lambda place: guess(place, strangers[place], text=False, weights=True),
        "text and weights, other seeds": lambda place: guess(place, strangers[place], text=True, weights=True),
    }


def _strangers(folders: Sequence[Path]) -> list[list[int]]:
    """For each adapter those whose A of one module that all have does not resemble its own."""
    from safetensors.torch import load_file

    key = "base_model.model.model.layers.5.self_attn.q_proj.lora_A.weight"
    first = [load_file(folder / "adapter_model.safetensors")[key].float().numpy() for folder in folders]

    def alike(one: Array, other: Array) -> bool:
        if one.shape != other.shape:
            return False
        cosine = np.sum(one * other) / np.linalg.norm(one) / np.linalg.norm(other)
        return bool(cosine > _SAME_SEED)

    return [[place for place, other in enumerate(first) if not alike(one, other)] for one in first]


def _score(pool: _Pool, name: str, guess: Callable[[int], Array]) -> Score:
    domains = np.array(pool.domains)
    top1, top3, domain, stolen, cosine = [], [], [], [], []
    for place in range(len(pool.folders)):
        vectors = pool.vectors.copy()
        vectors[place] = guess(place)
        order = np.argsort(-pool.prompts[place] @ vectors.T, axis=1)
        top1.append(np.mean(order[:, 0] == place))
        top3.append(np.mean((order[:, :3] == place).any(axis=1)))
        domain.append(np.mean(domains[order[:, 0]] == domains[place]))
        foreign = pool.prompts[domains != domains[place]] @ vectors.T
        stolen.append(np.mean(foreign.argmax(axis=2) == place))
        cosine.append(float(vectors[place] @ pool.vectors[place]))
    return Score(
        name,
        top1=_percent(top1),
        top3=_percent(top3),
        domain=_percent(domain),
        stolen=_percent(stolen),
        cosine=float(np.mean(cosine)),
    )


def _percent(rates: Sequence[Any]) -> float:
    return 100 * float(np.mean(rates))


def _show(scores: Sequence[Score]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("guessed from", "top 1 %", "top 3 %", "domain %", "stolen %", "cosine")
    for score in scores:
        numbers = (score.top1, score.top3, score.domain, score.stolen)
        table.add_row(score.guess, *(f"{number:.1f}" for number in numbers), f"{score.cosine:.3f}")
    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guess", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    main()
