"""The systems of the composition benchmark, all with the same inner names: ``name`` and ``run``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks._workload import Tokens, Workload
from lora_hub_sdk.composition.factors import AdapterFactors
from lora_hub_sdk.composition.mapping import build_plan
from lora_hub_sdk.composition.reference import mixture_einsum, stack_padded
from lora_hub_sdk.engine.adapter_cache import load_factors
from lora_hub_sdk.engine.base_model import BaseModel
from lora_hub_sdk.engine.decode import Row, decode
from lora_hub_sdk.engine.engine import Engine, Request
from lora_hub_sdk.types import Adapter, Route, Sampling

if TYPE_CHECKING:
    from torch import Tensor, nn


class System(Protocol):
    """One way to answer all rows of a workload in one batch.

    ``run`` answers greedily with exactly ``new_tokens`` tokens a row, whatever they are, and holds everything that a
    caller pays for at each batch: composing adapters is inside, reading them from disk is not (the warm-up did it).
    """

    name: str

    def run(self, new_tokens: int) -> Tokens: ...


class EngineSystem:
    """Our engine, on any routes."""

    def __init__(self, name: str, engine: Engine, workload: Workload, routes: Sequence[Route]) -> None:
        self.name = name
        self._engine = engine
        self._prompts = [" ".join(map(str, ids)) for ids in workload.prompts]
        self._routes = routes

    def run(self, new_tokens: int) -> Tokens:
        sampling = Sampling(max_new_tokens=new_tokens)
        completions = self._engine.generate(
            [
                Request(prompt, route, sampling, template=None)
                for prompt, route in zip(self._prompts, self._routes, strict=True)
            ]
        )
        return [_ids(completion.text) for completion in completions]

    def compose(self) -> None:
        """The composing step of ``run`` by itself."""
        self._engine.compose(self._routes)


class GenerateSystem:
    """``generate`` of transformers or of PEFT; ``options`` go to it as they are.

    Args:
        prepare: called before each run, for a model that several systems share.
    """

    def __init__(
        self,
        name: str,
        base: BaseModel,
        model: Any,
        workload: Workload,
        *,
        options: dict[str, Any] | None = None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self._model = model
        self._inputs = _left_padded(base, workload.prompts)
        self._options = options or {}
        self._prepare = prepare

    def run(self, new_tokens: int) -> Tokens:
        import torch

        self._prepare()
        with torch.inference_mode():
            output = self._model.generate(**self._inputs, max_new_tokens=new_tokens, **self._options)
        width = self._inputs["input_ids"].shape[1]
        return [tuple(row) for row in output[:, width:].tolist()]


class EinsumSystem:
    """The paper's printed form in the engine's own decoding loop: all p adapters of the batch on every row, then M."""

    def __init__(self, name: str, base: BaseModel, workload: Workload, routes: Sequence[Route]) -> None:
        self.name = name
        self._base = base
        self._prompts = workload.prompts
        self._plan = build_plan(routes)
        self._adapters = [load_factors(adapter) for adapter in self._plan.adapters]

    def run(self, new_tokens: int) -> Tokens:
        rows = [Row(Sampling(max_new_tokens=new_tokens), self._base) for _ in self._prompts]
        with self._hooks():
            decode(self._base, self._prompts, rows, layers=_FixedRows())
        return [_ids(row.done.text) for row in rows if row.done is not None]

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        paths = sorted({path for adapter in self._adapters for path in adapter.modules})
        handles = [self._base.modules[path].register_forward_hook(self._hook(path)) for path in paths]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        a, b, matrix = _stacked(self._adapters, self._plan.matrix, path, self._base)

        def add_delta(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return output + mixture_einsum(inputs[0], a, b, matrix)

        return add_delta


def peft_systems(base: BaseModel, workload: Workload) -> list[System]:
    """PEFT with one adapter for all rows, and with ``adapter_names``. Takes over ``base.model``: give it its own."""
    model = _peft_model(base, workload.chosen)
    names = [_peft_name(adapter) for adapter in workload.chosen]
    return [
        GenerateSystem(
            "peft one active", base, model, workload, prepare=lambda: model.set_adapter(names[0], inference_mode=True)
        ),
        GenerateSystem("peft adapter_names", base, model, workload, options={"adapter_names": names}),
    ]


def _peft_model(base: BaseModel, adapters: Sequence[Adapter]) -> Any:
    from peft import PeftModel

    first, *others = {adapter.digest: adapter for adapter in adapters}.values()
    # PEFT's default is to keep adapters in float32 beside a bfloat16 base, which would slow it down.
    options: dict[str, Any] = {"autocast_adapter_dtype": False}
    model: Any = PeftModel.from_pretrained(base.model, first.folder, adapter_name=_peft_name(first), **options)
    for adapter in others:
        model.load_adapter(adapter.folder, _peft_name(adapter), **options)
    return model.eval()


def _peft_name(adapter: Adapter) -> str:
    return f"adapter-{adapter.digest[:12]}"


def _left_padded(base: BaseModel, prompts: Tokens) -> dict[str, Tensor]:
    import torch

    width = max(map(len, prompts))
    ids = [[base.pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(ids, device=base.device),
        "attention_mask": torch.tensor(mask, device=base.device),
    }


def _stacked(
    adapters: Sequence[AdapterFactors], matrix: Sequence[Sequence[float]], path: str, base: BaseModel
) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    columns = [place for place, adapter in enumerate(adapters) if path in adapter.modules]
    a, b = stack_padded([adapters[place].modules[path] for place in columns])
    chosen = torch.tensor(matrix)[:, columns]
    return a.to(base.device, base.dtype), b.to(base.device, base.dtype), chosen.to(base.device, base.dtype)


class _FixedRows:
    """For hooks that never change within a batch: all rows end together, so none leaves it early."""

    def start_decoding(self) -> None:
        pass

    def narrow(self, keep: Tensor) -> None:
        raise AssertionError(f"rows other than {keep} ended early")


def _ids(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))
