"""Every system of the table in a few lines of plain torch: one sequence at a time, float32, dense, nothing cached.

Nothing of the package is imported here. A system is a ``Delta``: what it adds to a linear module's output.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Lora:
    """One adapter as its files tell it: A (r, d_in) and s B (d_out, r) by module path."""

    factors: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def read(cls, folder: Path) -> Lora:
        told = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        found = {}
        for key, a in tensors.items():
            if key.endswith(".lora_A.weight"):
                b = tensors[key.replace(".lora_A.", ".lora_B.")]
                scale = told["lora_alpha"] / (len(a) ** 0.5 if told["use_rslora"] else len(a))
                found[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = (a, scale * b)
        return cls(found)

    def padded(self, path: str, rank: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """A (rank, d_in) and s B (d_out, rank) with zeros where there is nothing."""
        a, b = torch.zeros(rank, shape[1]), torch.zeros(shape[0], rank)
        if path in self.factors:
            own_a, own_b = self.factors[path]
            a[: len(own_a)], b[:, : len(own_a)] = own_a, own_b
        return a, b


@dataclass(frozen=True)
class Delta:
    """Some adapters, stacked at each module: A (n, r, d_in) and s B (n, d_out, r), and how they are combined there.

    ``combine`` is given the path, x (l, d_in), A, s B, and how many tokens the prompt has; it returns (l, d_out).
    """

    loras: Sequence[Lora]
    combine: Callable[[str, Tensor, Tensor, Tensor, int], Tensor]

    def __call__(self, path: str, x: Tensor, shape: tuple[int, int], asked: int) -> Tensor:
        if not any(path in one.factors for one in self.loras):
            return torch.zeros(len(x), shape[0])
        rank = max(len(one.factors[path][0]) for one in self.loras if path in one.factors)
        pairs = [one.padded(path, rank, shape) for one in self.loras]
        return self.combine(path, x, torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs]), asked)


def mixture(loras: Sequence[Lora], weights: Sequence[float]) -> Delta:
    """sum_i w_i (s_i B_i A_i) x (paper section 4.2). One adapter of weight 1 is selection, none the base."""
    w = torch.tensor(weights)
    return Delta(loras, lambda path, x, a, b, asked: x @ torch.einsum("n,nor,nri->oi", w, b, a).T)


def fusion(loras: Sequence[Lora], weights: Sequence[float]) -> Delta:
    """(sum_i w_i s_i B_i)(sum_j w_j A_j) x (paper eq. 4); AdapterSoup and LoRAHub too."""
    w = torch.tensor(weights)

    def combine(path: str, x: Tensor, a: Tensor, b: Tensor, asked: int) -> Tensor:
        return x @ (torch.einsum("n,nor->or", w, b) @ torch.einsum("n,nri->ri", w, a)).T

    return Delta(loras, combine)


def experts(
    loras: Sequence[Lora],
    directions: Mapping[str, Tensor],
    *,
    top: int | None = None,
    absolute: bool = False,
    noise: Mapping[str, Tensor] | None = None,
) -> Delta:
    """sum_i w_i(x) (s_i B_i A_i) x, w(x) the softmax of <x, e_i> among the ``top`` highest.

    With ``noise`` (l, n) on the scores, the gradient is that of the softmax over all.
    """

    def combine(path: str, x: Tensor, a: Tensor, b: Tensor, asked: int) -> Tensor:
        scores = x @ directions[path].T
        if absolute:
            scores = scores.abs()
        if noise is not None:
            scores = scores + noise[path][: len(x)]
        soft = scores.softmax(-1)
        place = scores.argsort(-1, descending=True).argsort(-1)  # 0 for the highest
        hard = soft * (place < (top or len(a)))
        w = hard / hard.sum(-1, keepdim=True)
        if noise is not None:
            w = w.detach() + soft - soft.detach()
        each = torch.einsum("li,nri,nor->lno", x, a, b)
        return torch.einsum("ln,lno->lo", w, each)

    return Delta(loras, combine)


def smear(loras: Sequence[Lora], directions: Mapping[str, Tensor]) -> Delta:
    """Fusion with the softmax of <mean x over the prompt's tokens, e_i> (arXiv 2306.03745)."""

    def combine(path: str, x: Tensor, a: Tensor, b: Tensor, asked: int) -> Tensor:
        w = (directions[path] @ x[:asked].mean(0)).softmax(-1)
        return x @ (torch.einsum("n,nor->or", w, b) @ torch.einsum("n,nri->ri", w, a)).T

    return Delta(loras, combine)


def first_right(loras: Sequence[Lora]) -> dict[str, Tensor]:
    """Arrow's directions (arXiv 2405.11157): the first right singular vector of each s B A, or zeros."""
    found = {}
    for path in {path for one in loras for path in one.factors}:
        width = next(one.factors[path][0].shape[1] for one in loras if path in one.factors)
        rows = [torch.linalg.svd(b @ a).Vh[0] for a, b in (one.factors[path] for one in loras if path in one.factors)]
        left = iter(rows)
        found[path] = torch.stack([next(left) if path in one.factors else torch.zeros(width) for one in loras])
    return found


def ramole(loras: Sequence[Lora], routers: Mapping[str, tuple[Tensor, Tensor]]) -> Delta:
    """v_i = s_i B_i A_i x, q = A_r x, k_i = B_r^T v_i, w = softmax(<q, k_i> / sqrt(r)) (arXiv 2406.16989)."""

    def combine(path: str, x: Tensor, a: Tensor, b: Tensor, asked: int) -> Tensor:
        gate_a, gate_b = routers[path]
        v = torch.einsum("li,nri,nor->lno", x, a, b)
        scores = torch.einsum("li,wi,low,lno->ln", x, gate_a, gate_b.expand(len(x), -1, -1), v)
        return torch.einsum("ln,lno->lo", (scores / len(gate_a) ** 0.5).softmax(-1), v)

    return Delta(loras, combine)


class Plain:
    """The base model as transformers loads it, with a delta on every linear module."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def logits(self, ids: Sequence[int], delta: Delta, asked: int) -> Tensor:
        """(l, vocabulary), after each of the tokens, of which the first ``asked`` are the prompt's."""

        def hook(path: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
            return lambda module, given, out: out + delta(path, given[0][0], tuple(module.weight.shape), asked)  # type: ignore[arg-type]

        with ExitStack() as undo:
            for path, module in self.model.named_modules():
                if isinstance(module, nn.Linear):
                    undo.callback(module.register_forward_hook(hook(path)).remove)
            found: Tensor = self.model(torch.tensor([list(ids)]), use_cache=False).logits[0]
        return found

    def answer(self, prompt: str, delta: Delta, count: int) -> tuple[str, Tensor]:
        """The greedy answer's text, and the logits (tokens, vocabulary) that chose it."""
        asked = self.tokenizer(prompt).input_ids
        tokens: list[int] = []
        steps = []
        while len(tokens) < count and self.tokenizer.eos_token_id not in tokens:
            with torch.no_grad():
                steps.append(self.logits([*asked, *tokens], delta, len(asked))[-1])
            tokens.append(int(steps[-1].argmax()))
        return self.tokenizer.decode(tokens, skip_special_tokens=True), torch.stack(steps)

    def loss(self, prompt: Sequence[int], answer: Sequence[int], delta: Delta) -> Tensor:
        """The mean of -log p over the answer's tokens."""
        chances = self.logits([*prompt, *answer], delta, len(prompt)).log_softmax(-1)
        return -torch.stack([chances[len(prompt) - 1 + at, token] for at, token in enumerate(answer)]).mean()


Vectors = NDArray[np.float64]


def centre(vectors: Any) -> Vectors:
    """An adapter's, or a task's, vector: the mean of its texts' vectors, of length 1."""
    mean = np.asarray(vectors, dtype=np.float64).mean(0)
    found: Vectors = mean / np.linalg.norm(mean)
    return found


def nearest(query: Any, centres: Mapping[str, Vectors], k: int, *, but: Sequence[str] = ()) -> list[tuple[str, float]]:
    """The k names of the highest cosines, without some."""
    cosines = {name: float(np.asarray(query) @ one) for name, one in centres.items() if name not in but}
    return sorted(cosines.items(), key=lambda pair: -pair[1])[:k]


def softmax(values: Sequence[float], temperature: float) -> list[float]:
    raised = np.exp(np.asarray(values) / temperature)
    return list(map(float, raised / raised.sum()))
