"""The systems of the composition benchmark, all with the same inner names: ``name`` and ``run``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks._workload import Tokens, Workload
from lora_hub_sdk.composition.factors import AdapterFactors
from lora_hub_sdk.composition.mapping import build_plan
from lora_hub_sdk.composition.reference import mixture_einsum, stack_padded
from lora_hub_sdk.engine.adapter_file import load_factors
from lora_hub_sdk.engine.base_model import BaseModel
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.types import Adapter, Route, Sampling

if TYPE_CHECKING:
    from torch import Tensor, nn


def request(prompt: Sequence[int], route: Route, new_tokens: int) -> Request:
    """A prompt of token ids, answered greedily."""
    return Request(" ".join(map(str, prompt)), route, Sampling(max_new_tokens=new_tokens), template=None)


class System(Protocol):
    """One way to answer all rows of a workload in one batch.

    ``run`` answers greedily with exactly ``new_tokens`` tokens a row, whatever they are, and holds everything that a
    caller pays for at each batch; adapters are in memory from the warm-up on.
    """

    name: str

    def run(self, new_tokens: int) -> Tokens: ...


class EngineSystem:
    """Our engine, on any routes."""

    def __init__(self, name: str, engine: Engine, workload: Workload, routes: Sequence[Route]) -> None:
        self.name = name
        self._engine = engine
        self._prompts = workload.prompts
        self._routes = routes

    def run(self, new_tokens: int) -> Tokens:
        completions = self._engine.generate(
            [request(ids, route, new_tokens) for ids, route in zip(self._prompts, self._routes, strict=True)]
        )
        return [tuple(map(int, completion.text.split())) for completion in completions]


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
    """The paper's printed form in ``generate``: all p adapters of the batch on every row, then M.

    The adapters' factors are stacked once, here.
    """

    def __init__(self, name: str, base: BaseModel, workload: Workload, routes: Sequence[Route]) -> None:
        self.name = name
        self._base = base
        self._generate = GenerateSystem(name, base, base.model, workload)
        plan = build_plan(routes)
        adapters = [load_factors(adapter) for adapter in plan.adapters]
        paths = sorted({path for adapter in adapters for path in adapter.modules})
        self._stacks = {path: _stacked(adapters, plan.matrix, path, base) for path in paths}

    @property
    def size_bytes(self) -> int:
        """What the stacked factors take."""
        return sum(tensor.numel() * tensor.element_size() for stack in self._stacks.values() for tensor in stack)

    def run(self, new_tokens: int) -> Tokens:
        with ExitStack() as undo:
            for path, (a, b, matrix) in self._stacks.items():
                hook = _adding(a, b, matrix)
                undo.callback(self._base.modules[path].register_forward_hook(hook).remove)
            return self._generate.run(new_tokens)


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


def _adding(a: Tensor, b: Tensor, matrix: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def add_delta(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + mixture_einsum(inputs[0], a, b, matrix)

    return add_delta
