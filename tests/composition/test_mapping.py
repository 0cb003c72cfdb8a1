from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lora_hub_sdk.composition.mapping import build_plan, is_shared
from lora_hub_sdk.types import Member, Route
from tests.support import bare_adapter, route_of

A, B, C = (bare_adapter(name) for name in "abc")
POOL = [bare_adapter(f"lora{place}") for place in range(6)]


def routes() -> st.SearchStrategy[list[Route]]:
    member = st.builds(Member, st.sampled_from(POOL), st.floats(0.0, 1.0))
    members = st.lists(member, max_size=4, unique_by=lambda member: member.adapter.digest).map(tuple)
    return st.lists(
        st.builds(Route, st.just("mixture"), st.sampled_from(["outputs", "parameters"]), members), max_size=8
    )


def test_matrix_has_a_row_for_each_prompt_and_a_column_for_each_adapter() -> None:
    plan = build_plan(
        [route_of("mixture", (A, 0.5), (B, 0.5)), route_of("selection", (C, 1.0)), route_of("fusion", (B, 1.0))]
    )
    assert plan.adapters == (A, B, C)
    assert plan.matrix == ((0.5, 0.5, 0.0), (0.0, 0.0, 1.0), (0.0, 1.0, 0.0))
    assert plan.averaged == ("outputs", "outputs", "parameters")


def test_a_row_without_members_is_zero() -> None:
    plan = build_plan([route_of("base"), route_of("selection", (A, 1.0))])
    assert plan.matrix == ((0.0,), (1.0,))


def test_no_routes_make_an_empty_plan() -> None:
    assert build_plan([]).matrix == ()


def test_equal_content_under_two_names_is_one_column_with_added_weights() -> None:
    twin = bare_adapter("twin", digest=A.digest)
    plan = build_plan([route_of("mixture", (A, 0.25), (twin, 0.5))])
    assert plan.adapters == (A,)
    assert plan.matrix == ((0.75,),)


@given(routes())
def test_every_weight_arrives_in_its_own_cell(batch: list[Route]) -> None:
    plan = build_plan(batch)
    assert len(plan.matrix) == len(batch)
    assert len({adapter.digest for adapter in plan.adapters}) == len(plan.adapters)
    for row, route in zip(plan.matrix, batch, strict=True):
        told = {member.adapter.digest: member.weight for member in route.members}
        found = {adapter.digest: weight for adapter, weight in zip(plan.adapters, row, strict=True)}
        assert {digest: weight for digest, weight in found.items() if weight} == {
            digest: weight for digest, weight in told.items() if weight
        }


def test_a_batch_is_shared_when_all_rows_compose_alike() -> None:
    half = route_of("mixture", (A, 0.5), (B, 0.5))
    assert is_shared(build_plan([half, half]))
    assert is_shared(build_plan([route_of("base")]))
    assert not is_shared(build_plan([half, route_of("fusion", (A, 0.5), (B, 0.5))]))
    assert not is_shared(build_plan([half, route_of("mixture", (A, 0.5), (C, 0.5))]))
