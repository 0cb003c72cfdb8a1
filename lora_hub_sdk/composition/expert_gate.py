"""Gates over a fixed set of adapters, its experts: MoE, SMEAR and Arrow, and their one file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from lora_hub_sdk.composition.tensor_file import read_gate, read_tensors, tensor_bytes, write_whole
from lora_hub_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

#: What such a file says it is.
FORMAT: Final = "lora-hub-experts"
_VERSION: Final = "1"
_DIRECTIONS: Final = ".directions.weight"


@dataclass(frozen=True, slots=True)
class GateRule:
    """How scores become weights.

    Attributes:
        per: "token", or "prompt": once for each module, of the mean over the prompt's tokens of what goes into it; the
            answer's tokens then have these weights too.
        top_k: how many experts have weight; None is all of them.
        absolute: whether a score's sign counts for nothing.
        temperature: what scores are divided by.
    """

    per: Literal["token", "prompt"] = "token"
    top_k: int | None = None
    absolute: bool = False
    temperature: float = 1.0


#: By strategy. The mixtures of experts are those of LoraRetriever's section 5.1; SMEAR is arXiv 2306.03745, which
#: averages the experts' parameters and not their outputs; Arrow is arXiv 2405.11157 with the settings of PEFT.
RULES: Final[Mapping[str, GateRule]] = {
    "moe-soft": GateRule(),
    "moe-top3": GateRule(top_k=3),
    "moe-top1": GateRule(top_k=1),
    "smear": GateRule(per="prompt"),
    "arrow": GateRule(top_k=3, absolute=True),
}


@dataclass(frozen=True)
class ExpertGate:
    """Weights for each expert and module from what goes into the module: softmax over the scores <x, e_i>.

    Attributes:
        strategy: a name of ``RULES``.
        base_model: canonical name of the base model that it is for.
        experts: the adapters in the order of their scores, digest by name. It weighs no others.
        directions: by module path the e_i, (n, d_in), float32 on the CPU. In a module without any all weigh alike.
        training: how it was made and how that went, as JSON can hold it.

    Raises:
        ConfigurationError: a strategy that has no such gate, or directions that do not go with the experts.
    """

    strategy: str
    base_model: str
    experts: Mapping[str, str]
    directions: Mapping[str, Tensor] = field(repr=False)
    training: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.strategy not in RULES:
            raise ConfigurationError(
                f"strategy {self.strategy!r} has no fixed experts; choose one of {', '.join(RULES)}"
            )
        counts = {tensor.shape[0] for tensor in self.directions.values()}
        if counts != {len(self.experts)} or len(set(self.experts.values())) != len(self.experts):
            raise ConfigurationError(
                f"a gate needs one direction for each expert, and experts of different content; found {sorted(counts)} "
                f"directions for {len(self.experts)} experts"
            )

    @property
    def rule(self) -> GateRule:
        return RULES[self.strategy]

    @cached_property
    def digest(self) -> str:
        """sha256 of what ``save`` writes."""
        return hashlib.sha256(self._content()).hexdigest()

    def weights(self, scores: Tensor) -> Tensor:
        """As ``expert_weights``, by this gate's rule."""
        return expert_weights(scores, self.rule)

    def check_fits(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Refuse a base model whose linear modules have not the inputs (d_out, d_in) of the directions.

        Raises:
            ConfigurationError: names the first module that does not fit.
        """
        for path, tensor in self.directions.items():
            if path not in shapes or shapes[path][1] != tensor.shape[1]:
                found = f"has {tuple(shapes[path])}" if path in shapes else "lacks it"
                raise ConfigurationError(
                    f"the gate is for base model {self.base_model!r}: at {path!r} it reads {tensor.shape[1]} inputs, "
                    f"this base model {found}"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as one safetensors file; what was there before is replaced as a whole or not at all."""
        write_whole(Path(path), self._content())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExpertGate:
        """Read what ``save`` wrote.

        Raises:
            ConfigurationError: the file cannot be read, is no such gate, is one of another version, or is damaged.
        """
        return read_gate(path, cls._of, "hub.train_experts()")

    @classmethod
    def _of(cls, content: bytes) -> ExpertGate:
        tensors, told = read_tensors(content)
        if told.get("format") != FORMAT:
            raise ConfigurationError("this safetensors file is no gate over experts")
        if told.get("version") != _VERSION:
            raise ConfigurationError(f"format version {told.get('version')!r}, this package reads {_VERSION!r}")
        for name, tensor in tensors.items():
            if not name.endswith(_DIRECTIONS) or tensor.dim() != 2 or not tensor.isfinite().all():
                raise ConfigurationError(f"tensor {name!r} is no matrix of finite directions")
        try:
            facts = json.loads(told["facts"])
            strategy, experts, training = facts["strategy"], dict(facts["experts"]), facts["training"]
            base_model = told["base_model"]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"its metadata are incomplete ({error!r})") from error
        directions = {name.removesuffix(_DIRECTIONS): tensor.float() for name, tensor in sorted(tensors.items())}
        gate = cls(strategy, base_model, experts, directions, training)
        gate.__dict__["digest"] = hashlib.sha256(content).hexdigest()
        return gate

    def _content(self) -> bytes:
        tensors = {path + _DIRECTIONS: tensor for path, tensor in self.directions.items()}
        # A list, as the order of the experts is that of their scores.
        experts = list(self.experts.items())
        facts = json.dumps(
            {"strategy": self.strategy, "experts": experts, "training": dict(self.training)}, sort_keys=True
        )
        return tensor_bytes(
            tensors, {"format": FORMAT, "version": _VERSION, "base_model": self.base_model, "facts": facts}
        )


def expert_weights(scores: Tensor, rule: GateRule) -> Tensor:
    """Softmax over the last dimension among the ``top_k`` highest scores, float32; -inf marks places without an expert.

    Where no place has one, all weights are 0. Of equal scores at the border one is taken, as ``torch.topk`` chooses.
    """
    present = scores > -math.inf
    raised = (scores.abs().masked_fill(~present, -math.inf) if rule.absolute else scores).float() / rule.temperature
    if rule.top_k is not None and rule.top_k < scores.shape[-1]:
        kept = raised.topk(rule.top_k, dim=-1)
        raised = raised.new_full(raised.shape, -math.inf).scatter(-1, kept.indices, kept.values)
    some = raised.masked_fill(~present.any(-1, keepdim=True), 0.0)
    return some.softmax(-1).masked_fill(~present, 0.0)
