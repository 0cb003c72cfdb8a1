"""What variants of adapters, quantized bases and per-token weights cost, and what weightings give on real adapters.

    python -m benchmarks.variants
    python -m benchmarks.variants --json --part speed | jq .ratios      # one line of JSON for each report
    python -m benchmarks.variants --part gate --help                    # the options of that part

Speed is compared in one process and in turns: read the ratios. What weightings and a gate are worth is measured on real
adapters that are not part of this project, and skipped where they are absent.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from benchmarks import _variants_gate, _variants_weights
from benchmarks._report import Asked, Report, machine, spread, throughput_ratio
from benchmarks._rounds import in_turns
from benchmarks._systems import EngineSystem
from benchmarks._workload import Model, Sizes, build_workload, checkpoint, endless, random_adapters
from lora_hub_sdk.engine.base_model import ModelSettings, Quantization, load_base_model
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.types import Adapter, Route

if TYPE_CHECKING:
    from torch import Tensor

_DEMO_MODEL: Final = "smollm2-135m-instruct"
_SIZES: Final = Sizes(shortest=64, adapters=32, rounds=3)
#: Variants of adapters as ``tiny_adapter`` takes them, and what is asked of their mixture against the plain one.
_VARIANTS: Final[Mapping[str, tuple[dict[str, Any], Asked | None]]] = {
    "rsLoRA": ({"rslora": True, "alpha": 0.5}, None),
    "DoRA": ({"dora": True}, Asked(0.7)),
    "embedding and head": (
        {
            "modules": (
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "gate_proj",
                "up_proj",
                "down_proj",
                "embed_tokens",
                "lm_head",
            )
        },
        None,
    ),
    "norms of their own": ({"modules_to_save": ("norm", "input_layernorm")}, None),
}
#: The reading of factors must not be all that is compared: few enough adapters for whole modules to fit into memory.
_BASES: Final[tuple[tuple[str, str, Quantization | None], ...]] = (
    ("float32", "float32", None),
    ("bfloat16", "bfloat16", None),
    ("8bit", "bfloat16", "8bit"),
    ("4bit", "bfloat16", "4bit"),
)
_MIB: Final = 1 << 20
_ROOM: Final = 8 << 30

Part = Callable[[argparse.Namespace, Path], Iterator[Report]]


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, others = _parser().parse_known_args(given)
    if options.help and options.part not in QUALITY:
        _parser().print_help()
        return
    if others and options.part not in QUALITY:
        _parser().error(f"unknown options: {' '.join(others)}")
    import torch

    torch.set_num_threads(options.threads)
    for name in [options.part] if options.part else [*PARTS, *QUALITY]:
        if name in QUALITY:
            QUALITY[name](["--json"] * options.json + ["--help"] * options.help + others)
            continue
        with TemporaryDirectory(prefix="lora-hub-bench-") as temporary:
            for report in PARTS[name](options, Path(temporary)):
                if options.json:
                    print(report.as_json(), flush=True)
                else:
                    report.show()


@dataclass(frozen=True)
class RandomGate:
    """A gate with random weights at every linear module: what it costs does not depend on what it has learned."""

    digest: str
    width: int
    modules: Mapping[str, tuple[Tensor, Tensor]]
    strategy: str = "ramole"

    def module(self, path: str) -> tuple[Tensor, Tensor] | None:
        return self.modules.get(path)

    def weights(self, scores: Tensor) -> Tensor:
        import torch

        return torch.softmax(scores / self.width**0.5, -1).nan_to_num(0.0)

    @classmethod
    def on(cls, shapes: Mapping[str, tuple[int, int]], width: int) -> RandomGate:
        import torch

        draw = torch.Generator().manual_seed(0)
        return cls(
            f"random-{width}",
            width,
            {
                path: (
                    torch.randn(width, d_in, generator=draw) / d_in**0.5,
                    torch.randn(d_out, width, generator=draw) / d_out**0.5,
                )
                for path, (d_out, d_in) in shapes.items()
            },
        )


def measure_speed(model: Model, pools: Mapping[str, Sequence[Adapter]], sizes: Sizes, width: int) -> Report:
    """Mixtures of each pool of adapters, and of the plain one by a gate, against the mixture of the plain one."""
    # Room for all of them, so that reading them is no part of what is compared.
    with closing(Engine(model.load(), host_bytes=_ROOM, device_bytes=_ROOM)) as engine:
        engine.use_gate(RandomGate.on(engine.base.shapes, width))
        systems = []
        for name, adapters in pools.items():
            workload = build_workload(adapters, sizes, model.vocabulary)
            systems.append(EngineSystem(name, engine, workload, workload.mixture))
        workload = build_workload(pools["plain"], sizes, model.vocabulary)
        systems.append(EngineSystem("base", engine, workload, workload.base))
        systems.append(EngineSystem("RAMoLE", engine, workload, [_by_tokens(route) for route in workload.mixture]))
        calls = {system.name: partial(system.run, sizes.new_tokens) for system in systems}
        seconds = in_turns(calls, sizes.rounds)
    asked = {name: bound for name, (_, bound) in _VARIANTS.items()} | {"RAMoLE": Asked(0.6)}
    return Report(
        machine(),
        {"part": "speed", "base_model": model.id, "dtype": model.dtype, "gate width": width, **asdict(sizes)},
        {name: _tokens_per_s(taken, sizes) for name, taken in seconds.items()},
        {
            f"{name} / plain": _asked(throughput_ratio(seconds, name, "plain"), asked.get(name))
            for name in seconds
            if name != "plain"
        },
    )


def measure_bases(base_model: str, adapters: Sequence[Adapter], sizes: Sizes) -> Report:
    """Memory of the base by how it is loaded, and the throughput of a mixture on each."""
    resolved = resolve_model(base_model)
    with ExitStack() as closing_:
        systems, memory = [], dict[str, dict[str, float]]()
        for name, dtype, quantization in _BASES:
            settings = ModelSettings(dtype=dtype, quantization=quantization)  # type: ignore[arg-type]
            model = Model(resolved.id, resolved.folder, dtype, partial(_loaded, resolved, settings))
            engine = closing_.enter_context(closing(Engine(model.load())))
            memory[name] = {"base_MiB": engine.base.size_bytes / _MIB, "packed_MiB": engine.base.packed_bytes / _MIB}
            workload = build_workload(adapters, sizes, model.vocabulary)
            systems.append(EngineSystem(name, engine, workload, workload.mixture))
        seconds = in_turns({one.name: partial(one.run, sizes.new_tokens) for one in systems}, sizes.rounds)
    return Report(
        machine(),
        {"part": "bases", "base_model": resolved.id, **asdict(sizes)},
        {name: _tokens_per_s(taken, sizes) | memory[name] for name, taken in seconds.items()},
        {f"{name} / bfloat16": throughput_ratio(seconds, name, "bfloat16") for name in seconds if name != "bfloat16"},
    )


def _speed(options: argparse.Namespace, folder: Path) -> Iterator[Report]:
    sizes = Sizes.of(options)
    for dtype in ("float32", "bfloat16") if options.dtype == "both" else (options.dtype,):
        model = checkpoint(resolve_model(options.base_model), dtype)
        variants: dict[str, dict[str, Any]] = {"plain": {}} | {name: own for name, (own, _) in _VARIANTS.items()}
        pools = {
            name: random_adapters(folder / f"{dtype}-{place}", model.folder, sizes.adapters, sizes.rank, **own)
            for place, (name, own) in enumerate(variants.items())
        }
        yield measure_speed(model, pools, sizes, options.width)


def _bases(options: argparse.Namespace, folder: Path) -> Iterator[Report]:
    # Quantized products on a CPU take seconds a step.
    sizes = replace(Sizes.of(options), new_tokens=min(options.new_tokens, 8), rounds=min(options.rounds, 2))
    adapters = random_adapters(folder, resolve_model(options.base_model).folder, sizes.adapters, sizes.rank)
    yield measure_bases(options.base_model, adapters, sizes)


PARTS: Final[Mapping[str, Part]] = {"speed": _speed, "bases": _bases}
#: Parts with options of their own.
QUALITY: Final[Mapping[str, Callable[[Sequence[str]], None]]] = {
    "weights": _variants_weights.main,
    "gate": _variants_gate.main,
}


def _by_tokens(route: Route) -> Route:
    return replace(route, strategy="ramole", averaged="tokens")


def _loaded(resolved: Any, settings: ModelSettings) -> Any:
    return endless(load_base_model(resolved, settings))


def _tokens_per_s(seconds: Sequence[float], sizes: Sizes) -> dict[str, float]:
    return {"tokens_per_s": spread([sizes.batch * sizes.new_tokens / taken for taken in seconds])["median"]}


def _asked(figures: Mapping[str, float], bound: Asked | None) -> dict[str, Any]:
    return dict(figures) if bound is None else bound.of(figures)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.variants", description=(__doc__ or "").split("\n")[0], add_help=False
    )
    parser.add_argument("-h", "--help", action="store_true", help="of this, or of a part")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each report instead of tables")
    parser.add_argument("--part", choices=[*PARTS, *QUALITY], help="only this one")
    parser.add_argument("--base-model", default=_DEMO_MODEL)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="bfloat16")
    parser.add_argument("--width", type=int, default=8, help="of the gate's queries and keys")
    Sizes.add_options(parser, _SIZES)
    return parser


if __name__ == "__main__":
    main()
