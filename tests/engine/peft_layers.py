"""What PEFT itself makes of adapters, module by module: the reference for every variant and every family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_hub_sdk.types import Route

Layer = Callable[..., Tensor]


class PeftReference:
    """A plain model, each of whose modules gives y = M(x) + sum of w_i (M_i(x) - M(x)), one prompt at a time.

    M_i is the module as PEFT has it in a copy of the model with adapter i alone, so PEFT's own arithmetic decides what
    a variant means. For routes that average outputs; a single adapter of weight 1 is PEFT's own model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._layers: dict[Path, dict[str, nn.Module]] = {}

    def logits(self, route: Route, ids: Sequence[int]) -> Tensor:
        """Logits (vocabulary,) after the last token."""
        assert route.averaged == "outputs"
        members = [(member.weight, self._changed(member.adapter.folder)) for member in route.members]
        touched = {path: self._model.get_submodule(path) for path in {path for _, own in members for path in own}}
        try:
            for path, module in touched.items():
                present = [(weight, own[path]) for weight, own in members if path in own]
                module.__dict__["forward"] = partial(_mixed, partial(type(module).forward, module), present)
            with torch.inference_mode():
                output = self._model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))
                logits: Tensor = output.logits[0, -1].float()
                return logits
        finally:
            for module in touched.values():
                module.__dict__.pop("forward", None)

    def _changed(self, folder: Path) -> dict[str, nn.Module]:
        """The modules that PEFT wraps or changes, by path."""
        if folder not in self._layers:
            from peft import PeftModel

            copy: Any = PeftModel.from_pretrained(deepcopy(self._model), str(folder)).eval().base_model.model
            self._layers[folder] = {
                path: copy.get_submodule(path)
                for path, module in self._model.named_modules()
                if not any(True for _ in module.children()) and not _same(module, copy.get_submodule(path))
            }
        return self._layers[folder]


def _same(own: nn.Module, other: nn.Module) -> bool:
    if type(own) is not type(other):
        return False
    theirs = dict(other.named_parameters())
    return all(value.equal(theirs[name]) for name, value in own.named_parameters())


def _mixed(plain: Layer, members: Sequence[tuple[float, nn.Module]], *inputs: Tensor) -> Tensor:
    output = plain(*inputs)
    added = sum((weight * (layer(*inputs) - output).float() for weight, layer in members), torch.zeros(()))
    return (output + added).to(output.dtype)
