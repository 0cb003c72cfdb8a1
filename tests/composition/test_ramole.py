from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_hub_sdk.composition.factors import LoraFactors
from lora_hub_sdk.composition.ramole import Ramole, RouterLora, gate_scores, gate_weights
from lora_hub_sdk.composition.reference import ramole_einsum, stack_padded
from lora_hub_sdk.errors import ConfigurationError

D_IN, D_OUT, WIDTH = 12, 10, 4
RANKS = (3, 1, 5)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def factors_of(ranks: Sequence[int], seed: int = 0) -> list[LoraFactors]:
    draw = draws(seed)
    return [
        LoraFactors(torch.randn(r, D_IN, generator=draw), torch.randn(D_OUT, r, generator=draw), 0.5 + r) for r in ranks
    ]


def gate_of(seed: int = 0, **given: object) -> Ramole:
    draw = draws(seed)
    router = RouterLora(torch.randn(WIDTH, D_IN, generator=draw), torch.randn(D_OUT, WIDTH, generator=draw))
    facts: dict[str, object] = {"trained": {"sst2": "ab" * 32}, "training": {"losses": [0.5]}, **given}
    return Ramole("user/base", {"layers.0.q": router, "layers.1.q": router}, **facts)  # type: ignore[arg-type]


def efficient(x: Tensor, a: Tensor, b: Tensor, present: Tensor, gate_a: Tensor, gate_b: Tensor) -> Tensor:
    """As the engine and the trainer compute it: from h = A x and b^T s B, without any v."""
    rows, k = present.shape
    hidden = torch.einsum("bld,krd->blkr", x, a)
    keys = torch.einsum("kor,ow->krw", b, gate_b).expand(rows, *(k, b.shape[2], WIDTH))
    scores = gate_scores(hidden, x @ gate_a.t(), keys).masked_fill(~present[:, None], -math.inf)
    weights = gate_weights(scores, WIDTH)
    return torch.einsum("blkr,kor->blo", hidden * weights[..., None], b)


def test_the_efficient_form_has_the_value_and_the_gradients_of_the_papers() -> None:
    a, b = stack_padded(factors_of(RANKS))
    x = torch.randn(4, 6, D_IN, generator=draws(1))
    present = torch.tensor([[True, True, True], [True, False, True], [False, True, False], [False, False, False]])
    found = []
    for form in (efficient, ramole_einsum):
        gate = [part.clone().requires_grad_() for part in gate_of().module("layers.0.q") or ()]
        own = x.clone().requires_grad_()
        output = form(own, a, b, present, *gate)
        # The gradient of a plain sum would be the same for every output.
        output.square().sum().backward()  # type: ignore[no-untyped-call]
        found.append([output.detach(), own.grad, *(part.grad for part in gate)])
    for mine, papers in zip(*found, strict=True):
        assert mine is not None
        assert papers is not None
        torch.testing.assert_close(mine, papers, rtol=1e-5, atol=1e-5 * float(papers.abs().max()))


def test_a_row_without_members_weighs_nothing_and_has_no_gradient() -> None:
    scores = torch.full((2, 3), -math.inf, requires_grad=True)
    weights = gate_weights(scores, WIDTH)
    weights.sum().backward()  # type: ignore[no-untyped-call]
    assert weights.tolist() == [[0.0] * 3] * 2
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0.0] * 3] * 2


def test_weights_are_a_distribution_over_the_members_that_are_there() -> None:
    weights = gate_of().weights(torch.tensor([2.0, -math.inf, 0.0]))
    assert weights.tolist() == pytest.approx([math.e / (math.e + 1), 0.0, 1 / (math.e + 1)])  # sqrt(width) is 2


def test_a_saved_gate_comes_back_with_its_digest(tmp_path: Path) -> None:
    gate = gate_of()
    gate.save(tmp_path / "gate.safetensors")
    back = Ramole.load(tmp_path / "gate.safetensors")
    assert (back.digest, back.base_model, back.trained, back.training, back.width) == (
        gate.digest, gate.base_model, gate.trained, gate.training, WIDTH,
    )  # fmt: skip
    for mine, other in zip(gate.module("layers.1.q") or (), back.module("layers.1.q") or (), strict=True):
        assert mine.equal(other)
    assert back.module("layers.0.k") is None
    assert [file.name for file in tmp_path.iterdir()] == ["gate.safetensors"]


def test_the_digest_tells_weights_and_facts_apart() -> None:
    assert gate_of().digest == gate_of().digest
    assert len({gate_of().digest, gate_of(1).digest, gate_of(trained={}).digest}) == 3


@pytest.mark.parametrize("damage", ["gone", "cut", "text", "an adapter", "version", "half", "nan", "widths", "facts"])
def test_a_file_that_is_no_gate_is_refused_and_named(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.safetensors"
    gate_of().save(file)
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        file.write_text("not a tensor")
    else:
        tensors = load_file(file)
        told = {"format": "lora-hub-ramole", "version": "1", "base_model": "user/base"}
        told["facts"] = json.dumps({"trained": {}, "training": {}})
        if damage == "an adapter":
            told = {"format": "pt"}
        elif damage == "version":
            told["version"] = "99"
        elif damage == "half":
            del tensors["layers.0.q.router_b.weight"]
        elif damage == "nan":
            tensors["layers.0.q.router_a.weight"][0, 0] = math.nan
        elif damage == "widths":
            tensors["layers.0.q.router_a.weight"] = torch.zeros(WIDTH + 1, D_IN)
        else:
            told["facts"] = "{"
        save_file(tensors, file, metadata={"lora_hub": json.dumps(told)})
    with pytest.raises(ConfigurationError, match=r"broken\.safetensors"):
        Ramole.load(file)


def test_a_base_model_of_other_shapes_is_refused_by_the_module() -> None:
    shapes = {"layers.0.q": (D_OUT, D_IN), "layers.1.q": (D_OUT, D_IN)}
    gate_of().check_fits(shapes)
    with pytest.raises(ConfigurationError, match=r"layers\.1\.q.*\(10, 12\).*\(9, 12\)"):
        gate_of().check_fits({**shapes, "layers.1.q": (9, D_IN)})
    with pytest.raises(ConfigurationError, match="lacks it"):
        gate_of().check_fits({"layers.0.q": (D_OUT, D_IN)})
