"""Which form of the LoRA product a forward pass takes, decided by its shape alone. Pure.

What a form adds to all linear layers of SmolLM2-135M, in milliseconds, at a step of 16 rows with three adapters of rank
6 each, by how many of these ranks are different (two cores, `python -m benchmarks.engine --part forms`):

                   float32: 198    48    18      bfloat16: 198    48    18
    lookup                 11.9   8.2   6.9               11.7   8.1   7.4
    dense                  28.0   9.3   5.1               17.1   9.8   8.9
    gather                 16.8  12.6  11.2               21.3  18.8  18.1
    shared                   -     -    5.0                 -     -    8.8

Where rows have gates "dense" gains more. A step of 16 rows by Arrow over 28 adapters of rank 7, all 196 ranks in each
row, one core: 113 ms, by "lookup" 158 (bfloat16: 158, 234); prompts of 40 tokens 1.7 s, by "gather" 2.2 (1.4, 2.2).
"""

from __future__ import annotations

from typing import Final, Literal

#: "shared": all rows have one route, so its factors are used like one more linear layer.
#: "lookup": each row looks its ranks up in the pool, by embedding_bag; nothing is copied.
#: "dense": all ranks of the batch on every row, then M; copies each rank once a batch, and is products alone. Rows with
#: a gate take it for any number of tokens, with an M for each token.
#: "gather": each row's factors are copied side by side, for that layer and call only, then multiplied row by row.
Form = Literal["shared", "lookup", "dense", "gather"]

#: On a CPU, products over the different ranks win where each is looked up so many times.
_LOOKUPS: Final = 8
_LOOKUPS_HALF: Final = 24
#: On a GPU products are so much quicker than the bytes they read that only very many ranks make "dense" the worse form.
_DENSE_RANKS_GPU: Final = 4096


def choose_form(
    *,
    on_cpu: bool,
    half: bool,
    tokens: int,
    gated: bool = False,
    routes: int,
    looked_up: int,
    different: int,
    widest: int = 0,
) -> Form:
    """The form for a forward pass.

    Args:
        half: whether the factors take two bytes a number.
        tokens: of each row; 1 for a decoding step.
        gated: whether any row's weights come from a gate; they differ from token to token, so no two rows share any.
        routes: how many different routes the rows have.
        looked_up: the ranks of all rows together.
        different: how many different ranks these are.
        widest: the ranks of the row with the most; without a gate of no matter.
    """
    lookups = _LOOKUPS_HALF if half and not gated else _LOOKUPS
    looks_up = tokens == 1 and on_cpu and lookups * different > looked_up
    if gated and not looks_up:
        # The rows of one gate over all of a pool have the same ranks: these are multiplied once, and copied once.
        return "dense" if different <= widest or (tokens == 1 and on_cpu) else "gather"
    if looks_up:
        return "lookup"
    if tokens > 1:
        return "shared" if routes == 1 else "gather"
    if routes == 1:
        return "shared"
    return "dense" if on_cpu or different <= _DENSE_RANKS_GPU else "gather"
