"""What every system of a benchmark answers: the same prompts, routes and adapters."""

from __future__ import annotations

import random
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, cast

from lora_hub_sdk.composition.strategies import get_strategy, route_from_hits
from lora_hub_sdk.engine.base_model import BaseModel, ModelSettings, load_base_model
from lora_hub_sdk.engine.shapes import module_layout
from lora_hub_sdk.models import ResolvedModel
from lora_hub_sdk.registry.adapter_config import CONFIG_FILE, read_config_bytes
from lora_hub_sdk.registry.admission import WEIGHTS_FILE, content_digest
from lora_hub_sdk.testing.tiny import ATTENTION, MLP, tiny_adapter, unregistered
from lora_hub_sdk.types import Adapter, Hit, Route

Tokens = list[tuple[int, ...]]
#: A random adapter changes the answers and leaves the model's numbers in their usual range.
_RANDOM_SCALE: Final = 0.25
#: By how many places the numbers of each further random adapter are turned.
_TURN: Final = 7919
_HELP: Final = {
    "batch": "rows",
    "k": "adapters of each row's mixture and fusion",
    "prompt_tokens": "tokens of the longest prompt",
    "shortest": "tokens of the shortest prompt",
    "new_tokens": "tokens that every row decodes",
    "adapters": "how many random adapters",
    "rank": "of the random adapters",
    "rounds": "measured rounds, after one to warm up",
    "threads": "of torch",
}


@dataclass(frozen=True)
class Sizes:
    """How large a run is."""

    batch: int = 16
    k: int = 3
    prompt_tokens: int = 64
    shortest: int = 32
    new_tokens: int = 32
    adapters: int = 48
    rank: int = 6
    rounds: int = 5
    threads: int = 2

    @staticmethod
    def add_options(parser: ArgumentParser, defaults: Sizes) -> None:
        """One option for each field."""
        for name, default in asdict(defaults).items():
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=_HELP[name])

    @classmethod
    def of(cls, options: Namespace) -> Sizes:
        """From the options of a command line."""
        given = cls(**{field.name: getattr(options, field.name) for field in fields(cls)})
        return replace(given, shortest=min(given.shortest, given.prompt_tokens))


@dataclass(frozen=True)
class Model:
    """A base model. ``load`` gives a copy for one system alone, with no token that ends a text.

    ``folder`` holds its configuration.
    """

    id: str
    folder: Path
    dtype: str
    load: Callable[[], BaseModel]

    @property
    def vocabulary(self) -> int:
        from transformers import AutoConfig

        return int(AutoConfig.from_pretrained(self.folder).vocab_size)


class IdTokenizer:
    """A text is its token ids in decimal: all systems get exactly the same tokens, and theirs can be compared."""

    chat_template = bos_token_id = eos_token_id = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(token) for token in text.split()]}

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


@dataclass(frozen=True)
class Workload:
    """b prompts; for each a route over k adapters, averaged either way, and one adapter by itself."""

    prompts: Tokens
    mixture: tuple[Route, ...]
    fusion: tuple[Route, ...]
    selection: tuple[Route, ...]

    @property
    def base(self) -> tuple[Route, ...]:
        return (Route("base", "outputs"),) * len(self.prompts)

    @property
    def shared(self) -> tuple[Route, ...]:
        """The first row's mixture, for all rows."""
        return self.mixture[:1] * len(self.prompts)

    @property
    def chosen(self) -> list[Adapter]:
        """The one adapter of each row of ``selection``."""
        return [route.members[0].adapter for route in self.selection]


def checkpoint(resolved: ResolvedModel, dtype: str) -> Model:
    """A model as it is on disk."""
    settings = ModelSettings(dtype=cast(Any, dtype))
    return Model(resolved.id, resolved.folder, dtype, lambda: endless(load_base_model(resolved, settings)))


def endless(base: BaseModel) -> BaseModel:
    """The model with no token that ends a text: every system decodes the same number of tokens."""
    from transformers import GenerationConfig

    config: Any = GenerationConfig  # untyped
    # What the checkpoint says about sampling and ends must not reach ``generate`` either.
    cast(Any, base.model).generation_config = config(do_sample=False, pad_token_id=base.pad_id)
    return replace(base, eos_ids=frozenset(), tokenizer=cast(Any, IdTokenizer()))


def random_adapters(
    folder: Path, base: Path, count: int, rank: int, *, dtype: str = "float32", **variant: Any
) -> list[Adapter]:
    """Write ``count`` random LoRAs on all linear layers of the model in ``base``, in PEFT's format.

    They hold the same numbers at other places each: drawing and admitting a thousand would take minutes.

    Args:
        variant: what else they are, as ``tiny_adapter`` takes it.
    """
    from safetensors.torch import load_file, save_file

    asked: dict[str, Any] = {"alpha": _RANDOM_SCALE * rank, "modules": (*ATTENTION, *MLP)} | variant
    first = tiny_adapter(folder / "random-0", base, rank=rank, dtype=dtype, **asked)
    config = read_config_bytes(first, first.name)
    # PEFT stores the base's embedding beside factors for it, which would be most of the bytes.
    tensors = {key: one for key, one in load_file(first / WEIGHTS_FILE).items() if ".base_layer." not in key}
    save_file(tensors, first / WEIGHTS_FILE, metadata={"format": "pt"})
    admitted = unregistered(first, module_layout(base), id=0)
    found = [admitted]
    for number in range(1, count):
        own = folder / f"random-{number}"
        own.mkdir()
        # Magnitudes and whole modules have to stay near the base's.
        turned = {
            key: tensor.roll(number * _TURN) if ".lora_A" in key or ".lora_B" in key or ".lora_emb" in key else tensor
            for key, tensor in tensors.items()
        }
        save_file(turned, own / WEIGHTS_FILE, metadata={"format": "pt"})
        (own / CONFIG_FILE).write_bytes(config)
        digest = content_digest(config, (own / WEIGHTS_FILE).read_bytes())
        found.append(
            replace(
                admitted, id=number, name=own.name, folder=own, repo_id=str(own), digest=digest, revision=digest[:40]
            )
        )
    return found


def adapters_in(parent: Path, base: Path) -> list[Adapter]:
    """The adapters in the sub-folders of ``parent``, as a registry would hold them, without one.

    Raises:
        AdmissionError: a folder holds no adapter of this base model.
    """
    layout = module_layout(base)
    folders = sorted(path.parent for path in parent.glob(f"*/{CONFIG_FILE}"))
    return [unregistered(folder, layout, id=place) for place, folder in enumerate(folders)]


def build_workload(adapters: Sequence[Adapter], sizes: Sizes, vocabulary: int, *, seed: int = 0) -> Workload:
    """Random prompts of ``sizes.shortest`` to ``sizes.prompt_tokens`` tokens, and a random route for each."""
    draw = random.Random(seed)
    prompts: Tokens = []
    hits: list[list[Hit]] = []
    for row in range(sizes.batch):
        length = sizes.prompt_tokens - row * (sizes.prompt_tokens - sizes.shortest) // max(sizes.batch - 1, 1)
        prompts.append(random_prompt(draw, length, vocabulary))
        hits.append([Hit(adapter, 1.0) for adapter in draw.sample(list(adapters), sizes.k)])
    singles = [[Hit(adapters[row % len(adapters)], 1.0)] for row in range(sizes.batch)]
    return Workload(prompts, _routes("mixture", hits), _routes("fusion", hits), _routes("selection", singles))


def random_prompt(draw: random.Random, tokens: int, vocabulary: int) -> tuple[int, ...]:
    """Token ids without special ones, which stand at the beginning of a vocabulary."""
    return tuple(draw.randrange(vocabulary // 10, vocabulary) for _ in range(tokens))


def mixture_of(adapters: Sequence[Adapter]) -> Route:
    """The uniform mixture of these."""
    return route_from_hits(get_strategy("mixture"), [Hit(adapter, 1.0) for adapter in adapters])


def _routes(strategy: str, hits: Sequence[Sequence[Hit]]) -> tuple[Route, ...]:
    return tuple(route_from_hits(get_strategy(strategy), row) for row in hits)
