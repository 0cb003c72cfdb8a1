"""Which form of the LoRA product a forward pass takes, decided by its shape alone. Pure.

Times in milliseconds for all linear layers of SmolLM2-135M and one step of 16 rows with three adapters of rank 6 each
(two cores, `python -m benchmarks.engine --part forms`): "lookup" 8 in bfloat16 and 10 in float32, "gather" 14 and 31,
products over composed copies 16 and 13; "dense" 11 and 24 with 180 different ranks, 1 with 18.
"""

from __future__ import annotations

from typing import Final, Literal

#: "shared": all rows have one route, so its factors are used like one more linear layer.
#: "lookup": each row looks its ranks up in the pool, by embedding_bag; nothing is copied.
#: "dense": all ranks of the batch on every row, then M; copies each rank once a batch, and is products alone.
#: "gather": each row's factors are copied side by side, for that layer and call only, then multiplied row by row.
Form = Literal["shared", "lookup", "dense", "gather"]

#: On a CPU a rank costs in "dense" twice what it costs a row that looks it up.
_DENSE_COST_CPU: Final = 2
#: On a GPU products are so much quicker than the bytes they read that only very many ranks make "dense" the worse form.
_DENSE_RANKS_GPU: Final = 4096


def choose_form(*, on_cpu: bool, tokens: int, routes: int, looked_up: int, different: int) -> Form:
    """The form for a forward pass.

    Args:
        tokens: of each row; 1 for a decoding step.
        routes: how many different routes the rows have.
        looked_up: the ranks of all rows together.
        different: how many different ranks these are.
    """
    if routes == 1:
        return "shared"
    if tokens > 1:
        return "gather"
    if on_cpu:
        return "dense" if _DENSE_COST_CPU * different <= looked_up else "lookup"
    return "dense" if different <= _DENSE_RANKS_GPU else "gather"
