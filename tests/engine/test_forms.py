"""Which form a pass takes: the pure rule."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_hub_sdk.engine.forms import Form, choose_form


@pytest.mark.parametrize(
    ("on_cpu", "half", "tokens", "routes", "looked_up", "different", "form"),
    [
        (True, False, 512, 1, 18, 18, "shared"),
        (True, True, 512, 1, 18, 18, "shared"),
        (True, False, 2, 2, 12, 12, "gather"),
        (False, False, 2, 2, 12, 12, "gather"),
        # One row looks its ranks up; sixteen rows of one route share a product, in half precision only from 24 on.
        (True, False, 1, 1, 18, 18, "lookup"),
        (True, False, 1, 1, 288, 18, "shared"),
        (True, True, 1, 1, 288, 18, "lookup"),
        (True, True, 1, 1, 432, 18, "shared"),
        (True, False, 1, 16, 288, 180, "lookup"),
        (True, False, 1, 16, 288, 37, "lookup"),
        (True, False, 1, 16, 288, 36, "dense"),
        (True, True, 1, 16, 288, 36, "lookup"),
        (True, True, 1, 16, 288, 12, "dense"),
        (False, True, 1, 1, 9000, 9000, "shared"),
        (False, True, 1, 16, 288, 288, "dense"),
        (False, False, 1, 2, 4096, 4096, "dense"),
        (False, True, 1, 2, 4097, 4097, "gather"),
    ],
)
def test_the_shape_of_a_pass_decides_its_form(
    on_cpu: bool, half: bool, tokens: int, routes: int, looked_up: int, different: int, form: Form
) -> None:
    found = choose_form(
        on_cpu=on_cpu, half=half, tokens=tokens, routes=routes, looked_up=looked_up, different=different
    )
    assert found == form


@given(st.booleans(), st.booleans(), st.integers(1, 4096), st.integers(1, 64), st.integers(1, 9999), st.data())
def test_forms_for_one_token_are_chosen_for_one_token_only(
    on_cpu: bool, half: bool, tokens: int, routes: int, looked_up: int, data: st.DataObject
) -> None:
    different = data.draw(st.integers(1, looked_up))
    form = choose_form(on_cpu=on_cpu, half=half, tokens=tokens, routes=routes, looked_up=looked_up, different=different)
    assert form in get_args(Form)
    assert tokens == 1 or form in ("shared", "gather")
    assert routes == 1 or form != "shared"
    assert routes > 1 or form in ("shared", "lookup")
    assert on_cpu or form != "lookup"  # embedding_bag's gradient is no quick kernel on a GPU
