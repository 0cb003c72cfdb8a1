"""From the routes of a batch to its plan: the unique adapters and the mapping matrix M (paper section 4.3). Pure."""

from __future__ import annotations

from collections.abc import Sequence

from lora_hub_sdk.types import Adapter, Plan, Route


def build_plan(routes: Sequence[Route]) -> Plan:
    """Gather b routes into one plan: p unique adapters in order of first use, M of shape b x p.

    Adapters are the same when their content is (``digest``), whatever their names: equal factors are loaded once. An
    adapter that a route names twice has its weights added.
    """
    columns: dict[str, int] = {}
    adapters: list[Adapter] = []
    for route in routes:
        for member in route.members:
            if member.adapter.digest not in columns:
                columns[member.adapter.digest] = len(adapters)
                adapters.append(member.adapter)
    matrix = []
    for route in routes:
        row = [0.0] * len(adapters)
        for member in route.members:
            row[columns[member.adapter.digest]] += member.weight
        matrix.append(tuple(row))
    return Plan(tuple(adapters), tuple(matrix), tuple(route.averaged for route in routes))


def distinct_rows(plan: Plan) -> tuple[list[int], list[int]]:
    """Rows of the plan that compose differently, and for each row of the batch its place among them.

    Prompts with one route share one composition, so it is built once.
    """
    seen: dict[tuple[tuple[float, ...], str], int] = {}
    firsts: list[int] = []
    places: list[int] = []
    for row, key in enumerate(zip(plan.matrix, plan.averaged, strict=True)):
        if key not in seen:
            seen[key] = len(firsts)
            firsts.append(row)
        places.append(seen[key])
    return firsts, places
