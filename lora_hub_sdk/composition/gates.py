"""Weights for each token and module, or each prompt and module, instead of one for each prompt: what the engine serves.

A gate scores a row's adapters by their outputs (``TokenGate``), or a fixed set of them by a module's input
(``ExpertGate``). Both turn scores into weights by themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

from lora_hub_sdk.composition.expert_gate import ExpertGate

if TYPE_CHECKING:
    from torch import Tensor


class TokenGate(Protocol):
    """Scores a row's adapters at every token of every module, from what the engine has computed anyway.

    At a module, member i of a route has the activations h = A_i x (r_i,) and the output v = s_i B_i h. With the gate's
    query q = a x (width,) its score is <q, b^T v>. As b^T s_i B_i (width, r_i) is known once the adapter is, v itself
    is never needed: the cost is b * l * (sum of r) * width multiplications instead of b * l * p * d.
    """

    @property
    def strategy(self) -> str:
        """The strategy whose routes it weighs."""
        ...

    @property
    def digest(self) -> str:
        """Identity of the gate's weights."""
        ...

    @property
    def width(self) -> int:
        """How long queries and keys are."""
        ...

    def module(self, path: str) -> tuple[Tensor, Tensor] | None:
        """a (width, d_in) and b (d_out, width) of a module, float32 on the CPU; None gives every member the score 0."""
        ...

    def weights(self, scores: Tensor) -> Tensor:
        """From scores (..., k) to weights of the same shape; -inf marks places without a member. Differentiable."""
        ...


Gate: TypeAlias = TokenGate | ExpertGate
