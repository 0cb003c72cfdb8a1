"""A gate's training on a tiny model: its forward against the paper's form, what it is made of, and going on exactly."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_hub_sdk.composition.factors import LoraFactors
from lora_hub_sdk.composition.ramole import Ramole
from lora_hub_sdk.composition.reference import ramole_einsum, stack_padded
from lora_hub_sdk.engine import _gate_run
from lora_hub_sdk.engine._gate_forward import FactorBank, GateBatch, GatedForward
from lora_hub_sdk.engine._gate_rows import GateRow, hold_out, plan_step, read_gate_rows
from lora_hub_sdk.engine._gate_run import first_routers
from lora_hub_sdk.engine.adapter_file import load_factors
from lora_hub_sdk.engine.base_model import BaseModel, load_base_model
from lora_hub_sdk.engine.gate_training import GateTrainer
from lora_hub_sdk.errors import ConfigurationError, SamplesError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing import tiny_adapter
from tests.support import adapter_at, relative_error

WORDS = ("oak", "lamp", "stone", "paper")
ASKED = {
    "french": "Translate {} to French",
    "plural": "The plural of {}",
    "mood": "Is {} good or bad?",
    "rhyme": "{} rhymes with",
}
MODULES = (("q_proj", "v_proj", "down_proj"), ("q_proj",), ("o_proj", "lm_head"), ("q_proj", "k_proj", "up_proj"))
SMALL = GateTrainer(width=4, steps=4, batch=4, check_every=2, answer_tokens=6, drop=0.3, validation=0.25)


@pytest.fixture
def pool(hub: LoraHub, base: Path, tmp_path: Path) -> LoraHub:
    """Four adapters of differing ranks and modules, with samples."""
    for seed, (name, asked) in enumerate(ASKED.items()):
        folder = tiny_adapter(tmp_path / name, base, seed=seed, rank=2 + seed, modules=MODULES[seed], alpha=30)
        hub.register(folder, base_model=base, samples=[asked.format(word) for word in WORDS])
    return hub


@pytest.fixture(scope="module")
def loaded(base: Path) -> BaseModel:
    return load_base_model(resolve_model(base))


def adapters(base: Path, folder: Path) -> list[Any]:
    return [
        load_factors(
            adapter_at(tiny_adapter(folder / str(seed), base, seed=seed, rank=1 + seed, modules=modules), base)
        )
        for seed, modules in enumerate(MODULES)
    ]


def by_the_paper(
    base: BaseModel, bank: Sequence[Any], batch: GateBatch, members: Sequence[Sequence[int]], routers: Mapping[str, Any]
) -> Tensor:
    """Each row's mean -log p with all v_i in memory, and the whole vocabulary at every position."""

    def hook(path: str) -> Callable[..., Tensor]:
        d_out, d_in = base.shapes[path]
        nothing = LoraFactors(torch.zeros(1, d_in), torch.zeros(d_out, 1), 1.0)
        a, b = stack_padded([factors.modules.get(path, nothing) for factors in bank])
        present = torch.tensor([[number in row for number in range(len(bank))] for row in members])

        def add(_module: object, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            return output + ramole_einsum(inputs[0], a, b, present, *routers[path])

        return add

    hooks = [base.modules[path].register_forward_hook(hook(path)) for path in routers]
    try:
        model: Any = base.model
        scores = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits.log_softmax(-1)
    finally:
        for one in hooks:
            one.remove()
    each = -scores.flatten(0, 1)[batch.at, batch.targets] * batch.shares
    rows = batch.at // batch.ids.shape[1]
    return torch.stack([each[rows == row].sum() for row in range(len(batch.ids))])


def test_losses_and_gradients_are_those_of_the_papers_form(base: Path, loaded: BaseModel, tmp_path: Path) -> None:
    factors = adapters(base, tmp_path)
    bank = FactorBank(factors, loaded)
    batch = GateBatch.of([([5, 6, 7], [8, 9]), ([11, 12, 13, 14, 15], [16]), ([20], [21, 22, 23])], 0, loaded.device)
    members = [(0, 1, 3), (2,), (3, 2)]
    routers = first_routers(bank, 4, 1.0, 0)
    own = GatedForward(loaded, bank).losses(batch, members, routers)
    own.sum().backward()  # type: ignore[no-untyped-call]
    gradients = [part.grad for pair in routers.values() for part in pair]
    copies = {path: tuple(p.detach().clone().requires_grad_() for p in pair) for path, pair in routers.items()}
    papers = by_the_paper(loaded, factors, batch, members, copies)
    papers.sum().backward()  # type: ignore[no-untyped-call]
    assert relative_error(own, papers) < 1e-5
    expected = [part.grad for pair in copies.values() for part in pair]
    largest = max(float(part.abs().max()) for part in expected if part is not None)
    for mine, theirs in zip(gradients, expected, strict=True):
        assert mine is not None
        assert theirs is not None
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * largest)
    # A first gate that could not move would pass the comparison.
    assert all(part is not None and part.abs().max() > 0 for part in gradients)
    assert all("forward" not in module.__dict__ for module in loaded.modules.values())
    assert not any(weight.requires_grad for weight in loaded.model.parameters())


def test_without_routers_adapters_are_weighed_alike(base: Path, loaded: BaseModel, tmp_path: Path) -> None:
    factors = adapters(base, tmp_path)
    bank = FactorBank(factors, loaded)
    batch = GateBatch.of([([5, 6, 7], [8, 9]), ([11, 12], [16, 3])], 0, loaded.device)
    idle = {path: (torch.zeros(2, a.shape[1]), torch.zeros(b.shape[1], 2)) for path, (a, b) in bank.modules.items()}
    found = GatedForward(loaded, bank).losses(batch, [(0, 1, 2), (3,)], None)
    assert relative_error(found, by_the_paper(loaded, factors, batch, [(0, 1, 2), (3,)], idle)) < 1e-5


def test_a_pass_that_fails_leaves_the_model_as_it_came(base: Path, loaded: BaseModel, tmp_path: Path) -> None:
    forward = GatedForward(loaded, FactorBank(adapters(base, tmp_path), loaded))
    batch = GateBatch.of([([10**6], [3])], 0, loaded.device)
    with pytest.raises(IndexError):
        forward.losses(batch, [(0,)], None)
    assert all("forward" not in module.__dict__ for module in loaded.modules.values())
    assert loaded.turn.acquire(blocking=False)
    loaded.turn.release()


def test_the_registrys_samples_train_a_gate_towards_each_adapters_own_answers(
    pool: LoraHub, base: Path, tmp_path: Path
) -> None:
    recipe: dict[str, Any] = {"steps": 20, "learning_rate": 0.02, "batch": 12, "answer_tokens": 6, "validation": 0.25}
    report = pool.train_gate(
        base_model=base, output=tmp_path / "gate.safetensors", drop=0.0, others=0.0, check_every=40, **recipe
    )
    assert report.skipped == {}
    assert (report.trained, report.unseen, report.rows, report.held_out) == (tuple(sorted(ASKED)), (), 12, 4)
    assert report.own_loss is not None
    assert report.uniform_loss is not None
    # Greedy answers are what the own adapter finds likely, and a mixture finds less so.
    assert report.own_loss < report.uniform_loss
    # Each step has every row, and the first one weighs their adapters nearly alike.
    assert report.losses[-1] < 0.97 * report.losses[0]
    gate = Ramole.load(report.file)
    assert gate.digest == report.digest
    assert gate.trained == {name: pool.get(name).digest for name in ASKED}
    gate.check_fits(pool.engine(base).base.shapes)
    assert not (tmp_path / "gate.safetensors.part").exists()


def test_a_share_of_the_adapters_stays_unseen(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    report = SMALL.fit(pool, base_model=base, output=tmp_path / "gate", fraction=0.5)
    assert len(report.trained) == len(report.unseen) == 2
    assert set(report.trained) | set(report.unseen) == set(ASKED)
    assert Ramole.load(tmp_path / "gate").trained.keys() == set(report.trained)


def test_a_killed_training_goes_on_to_the_same_gate(
    pool: LoraHub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = SMALL.fit(pool, base_model=base, output=tmp_path / "whole")
    dealt: list[int] = []
    plan = plan_step

    def killed(*args: Any, step: int, **given: Any) -> Any:
        dealt.append(step)
        if len(dealt) == 4:
            raise KeyboardInterrupt
        return plan(*args, step=step, **given)

    monkeypatch.setattr(_gate_run, "plan_step", killed)
    with pytest.raises(KeyboardInterrupt):
        SMALL.fit(pool, base_model=base, output=tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    asked = pool.engine(base).batches
    resumed = SMALL.fit(pool, base_model=base, output=tmp_path / "broken")
    assert dealt == [0, 1, 2, 3, 2, 3]  # from the checkpoint after two steps on
    assert pool.engine(base).batches == asked  # answers are not asked for again
    for name, tensor in load_file(tmp_path / "whole").items():
        assert tensor.equal(load_file(tmp_path / "broken")[name]), name
    assert (resumed.losses, resumed.validation, resumed.own_loss) == (whole.losses, whole.validation, whole.own_loss)
    assert resumed.digest == whole.digest


def test_a_finished_training_is_not_repeated_and_another_does_not_replace_it(
    pool: LoraHub, base: Path, tmp_path: Path
) -> None:
    first = SMALL.fit(pool, base_model=base, output=tmp_path / "gate")
    again = SMALL.fit(pool, base_model=base, output=tmp_path / "gate")
    assert (again.digest, again.losses, again.seconds) == (first.digest, first.losses, 0.0)
    with pytest.raises(ConfigurationError, match="another training"):
        GateTrainer(width=3).fit(pool, base_model=base, output=tmp_path / "gate")


def test_a_checkpoint_of_another_training_is_not_gone_on_with(
    pool: LoraHub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lora_hub_sdk.engine.gate_training._gate", killed)
        with pytest.raises(KeyboardInterrupt):
            SMALL.fit(pool, base_model=base, output=tmp_path / "gate")
    with pytest.raises(ConfigurationError, match="another training that was not finished"):
        GateTrainer(width=3, answer_tokens=6).fit(pool, base_model=base, output=tmp_path / "gate")


def test_given_rows_need_no_answers_of_the_engine(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    rows = [
        {"inputs": f"{name} {word}", "targets": word, "adapter": name} for name in ("french", "mood") for word in WORDS
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = SMALL.fit(pool, base_model=base, output=tmp_path / "one", rows=rows)
    assert pool.engine(base).batches == 0
    assert given.trained == ("french", "mood")
    assert given.skipped.keys() == {"plural", "rhyme"}
    assert SMALL.fit(pool, base_model=base, output=tmp_path / "other", rows=file).digest == given.digest


def test_adapters_that_a_gate_cannot_weigh_are_left_out_by_name(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    variants: dict[str, dict[str, Any]] = {
        "dora": {"dora": True},
        "bias": {"lora_bias": True},
        "saved": {"modules_to_save": ["norm"]},
        "table": {"modules": ["embed_tokens"]},
        "pissa": {"init": "pissa"},
    }
    for name, variant in variants.items():
        pool.register(tiny_adapter(tmp_path / name, base, **variant), base_model=base, samples=[f"{name} of a lamp"])
    report = SMALL.fit(pool, base_model=base, output=tmp_path / "gate")
    assert report.trained == tuple(sorted([*ASKED, "pissa"]))
    assert report.skipped.keys() == {"dora", "bias", "saved", "table"}
    for name, why in (("dora", "DoRA"), ("bias", "has a bias"), ("saved", "modules_to_save"), ("table", "no linear")):
        assert why in report.skipped[name]


def test_a_gate_needs_two_adapters(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    rows = [{"inputs": "a", "targets": "b", "adapter": "french"}]
    with pytest.raises(SamplesError, match="1 can be trained on"):
        SMALL.fit(pool, base_model=base, output=tmp_path / "gate", rows=rows)


@pytest.mark.parametrize(
    "row", [{"inputs": "a", "adapter": "french"}, {"inputs": "", "targets": "b", "adapter": "c"}, "text"]
)
def test_a_row_of_another_form_is_told_by_its_number(row: Any) -> None:
    with pytest.raises(ConfigurationError, match="row 2"):
        read_gate_rows([{"inputs": "a", "targets": "b", "adapter": "c"}, row])


def test_rows_of_an_adapter_that_is_not_registered_are_refused(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no adapter 'nobody'"):
        SMALL.fit(
            pool, base_model=base, output=tmp_path / "g", rows=[{"inputs": "a", "targets": "b", "adapter": "nobody"}]
        )


@pytest.mark.parametrize(
    "given",
    [{"width": 0}, {"k": 1}, {"drop": 1.0}, {"learning_rate": 0}, {"steps": True}, {"others": 1.5}, {"seed": -1}],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"{next(iter(given))}="):
        GateTrainer(**given)


ROWS = [GateRow(f"{name} {number}", name, "x") for name in ("a", "b", "c") for number in range(4)]


def places(step: int, **given: Any) -> list[Any]:
    near = dict.fromkeys(range(len(ROWS)), (0, 1, 2))
    options = {"batch": 6, "k": 2, "drop": 0.5, "others": 0.5, "seed": 0, **given}
    return plan_step(ROWS, range(len(ROWS)), near, ["a", "b", "c"], step=step, **options)


def test_adapters_and_their_rows_take_turns() -> None:
    dealt = [place.row for step in range(2) for place in places(step)]
    assert sorted(dealt) == list(range(12))
    assert sorted(ROWS[row].adapter for row in dealt[:3]) == ["a", "b", "c"]
    assert places(1) == places(1) != places(1, seed=1)


def test_adapters_are_dropped_at_random_and_one_stays() -> None:
    dealt = [place for step in range(40) for place in places(step, drop=0.9)]
    assert {len(place.members) for place in dealt} == {1, 2}
    names = ["a", "b", "c"]
    assert any(ROWS[place.row].adapter not in [names[m] for m in place.members] for place in dealt)
    kept = [place.members for step in range(9) for place in places(step, drop=0.0, others=0.0)]
    assert set(kept) == {(0, 1, 2)}
    strangers = [place for step in range(9) for place in places(step, drop=0.0, others=1.0)]
    assert all(names[place.members[0]] == ROWS[place.row].adapter for place in strangers)
    assert all(len(set(place.members)) == 2 for place in strangers)


def test_rows_to_measure_with_are_as_many_of_each_adapter_and_never_all() -> None:
    kept, held = hold_out([row.adapter for row in ROWS], 0.5, 3, 0)
    assert sorted([*kept, *held]) == list(range(12))
    assert [ROWS[row].adapter for row in held] == ["a", "b", "c"]
    assert hold_out(["a"], 0.9, 9, 0) == ([0], [])
