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


def is_shared(plan: Plan) -> bool:
    """Whether all rows compose alike, so that one composition serves the whole batch."""
    return len(set(zip(plan.matrix, plan.averaged, strict=True))) == 1
