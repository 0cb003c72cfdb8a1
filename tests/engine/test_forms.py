"""Which form a pass takes: the pure rule."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_hub_sdk.engine.forms import Form, choose_form


@pytest.mark.parametrize(
    ("on_cpu", "tokens", "routes", "looked_up", "different", "form"),
    [
        (True, 1, 1, 18, 18, "shared"),
        (True, 512, 1, 18, 18, "shared"),
        (False, 1, 1, 9000, 9000, "shared"),
        (True, 2, 2, 12, 12, "gather"),
        (False, 2, 2, 12, 12, "gather"),
        (True, 1, 16, 288, 180, "lookup"),
        (True, 1, 16, 288, 145, "lookup"),
        (True, 1, 16, 288, 144, "dense"),
        (True, 1, 16, 288, 18, "dense"),
        (False, 1, 16, 288, 288, "dense"),
        (False, 1, 2, 4096, 4096, "dense"),
        (False, 1, 2, 4097, 4097, "gather"),
    ],
)
def test_the_shape_of_a_pass_decides_its_form(
    on_cpu: bool, tokens: int, routes: int, looked_up: int, different: int, form: Form
) -> None:
    assert choose_form(on_cpu=on_cpu, tokens=tokens, routes=routes, looked_up=looked_up, different=different) == form


@given(st.booleans(), st.integers(1, 4096), st.integers(1, 64), st.integers(1, 9999), st.data())
def test_forms_for_one_token_are_chosen_for_one_token_only(
    on_cpu: bool, tokens: int, routes: int, looked_up: int, data: st.DataObject
) -> None:
    different = data.draw(st.integers(1, looked_up))
    form = choose_form(on_cpu=on_cpu, tokens=tokens, routes=routes, looked_up=looked_up, different=different)
    assert form in get_args(Form)
    assert tokens == 1 or form in ("shared", "gather")
    assert (form == "shared") == (routes == 1)
    assert on_cpu or form != "lookup"  # embedding_bag's gradient is no quick kernel on a GPU
