"""Which modules share an input, found by running the model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lora_hub_sdk.engine.base_model import load_base_model
from lora_hub_sdk.engine.input_groups import input_groups
from lora_hub_sdk.models import resolve_model


class Odd(nn.Module):
    """A module that nobody calls, one that is called twice, and two that share an input, the narrower one first."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Embedding(2, 8)
        self.never, self.twice = nn.Linear(8, 8), nn.Linear(8, 8)
        self.narrow, self.wide = nn.Linear(8, 4), nn.Linear(8, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Tensor:
        x = self.twice(self.start(input_ids))
        x = self.twice(x)
        wide: Tensor = self.wide(x)[..., :4] + self.narrow(x)
        return wide


def test_attention_and_mlp_of_a_llama_share_their_inputs(base: Path) -> None:
    loaded = load_base_model(resolve_model(base))
    assert loaded.groups == [
        *(
            tuple(f"model.layers.{layer}.{name}" for name in group)
            for layer in range(2)
            for group in (
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("self_attn.o_proj",),
                ("mlp.gate_proj", "mlp.up_proj"),
                ("mlp.down_proj",),
            )
        ),
        ("lm_head",),
    ]
    assert {path for group in loaded.groups for path in group} == loaded.shapes.keys()


def test_modules_that_are_not_called_once_stand_alone_and_wide_ones_come_first() -> None:
    model = Odd()
    groups = input_groups(model, ["never", "twice", "narrow", "wide"])
    assert sorted(groups) == [("never",), ("twice",), ("wide", "narrow")]


def test_looking_leaves_no_hook_behind() -> None:
    model = Odd()
    input_groups(model, ["twice", "wide"])
    assert not any(module._forward_hooks for module in model.modules())
