"""Adapters that are good by themselves and have no one meaning together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_hub_sdk.composition.combining import check_combining
from lora_hub_sdk.composition.factors import AdapterFactors, LoraFactors
from lora_hub_sdk.errors import UnsupportedRouteError
from lora_hub_sdk.types import Averaged, Member, Route
from tests.support import bare_adapter

PLAIN, OTHER = bare_adapter("plain"), bare_adapter("other")


def factors(digest: str, *, saved: bool = False, converted: bool = False, **beside: Any) -> AdapterFactors:
    own = LoraFactors(torch.ones(2, 3), torch.ones(4, 2), 1.0, **beside)
    parameters = {"norm": {"weight": torch.ones(3)}} if saved else {}
    return AdapterFactors(digest, {"q": own}, parameters, converted=converted)


def check(averaged: Averaged, other: AdapterFactors, *weights: float) -> None:
    members = tuple(Member(*pair) for pair in zip((PLAIN, OTHER), weights, strict=True))
    check_combining(Route("any", averaged, members), {PLAIN.digest: factors(PLAIN.digest), OTHER.digest: other})


@pytest.mark.parametrize(
    ("other", "kept"),
    [
        (factors(OTHER.digest, gain=torch.ones(4)), "a gain"),
        (factors(OTHER.digest, shift=torch.ones(4)), "biases"),
        (factors(OTHER.digest, saved=True), "modules of its own"),
    ],
    ids=["gain", "shift", "saved"],
)
def test_what_a_gate_cannot_weigh_is_named_and_may_be_averaged_otherwise(other: AdapterFactors, kept: str) -> None:
    with pytest.raises(UnsupportedRouteError, match=f"'other' has {kept}.*strategy 'mixture'"):
        check("tokens", other, 0.5, 0.5)
    with pytest.raises(UnsupportedRouteError, match=f"'other' has {kept}"):
        check("prompt", other, 0.5, 0.5)
    check("outputs", other, 0.5, 0.5)
    check("parameters", other, 0.5, 0.5)
    check("tokens", other, 1.0, 0.0)  # without weight it takes no part


def test_factors_of_unknown_signs_are_not_averaged_with_others_but_work_alone_and_in_a_mixture() -> None:
    other = factors(OTHER.digest, converted=True)
    with pytest.raises(UnsupportedRouteError, match="'other' was trained by PiSSA or OLoRA"):
        check("parameters", other, 0.5, 0.5)
    with pytest.raises(UnsupportedRouteError, match="'other' was trained by PiSSA or OLoRA"):
        check("prompt", other, 0.5, 0.5)
    check("parameters", other, 0.0, 1.0)
    check("outputs", other, 0.5, 0.5)
    check("tokens", other, 0.5, 0.5)
