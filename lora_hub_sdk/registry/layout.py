"""What admission knows of a base model: the modules that adapters can change, by path and shape, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class BaseLayout:
    """The parts of a base model that an adapter may change.

    Attributes:
        linears: (d_out, d_in) of every linear module.
        embedding: path and (vocabulary, width) of the input embedding; None where it is no plain table.
        parameters: shape of each parameter of the linear modules, of the input embedding and of the norms, as the
            model stores it: what modules_to_save may replace.
        head: path of the linear module that makes the logits.
        tied: whether the head's weight is the embedding's.
        others: paths of the other modules with parameters of their own: position embeddings, experts, routers.
    """

    linears: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    embedding: tuple[str, tuple[int, int]] | None = None
    parameters: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    head: str | None = None
    tied: bool = False
    others: frozenset[str] = frozenset()

    def factors(self, path: str) -> tuple[int, int] | None:
        """(d_out, d_in) of the factors that a module takes; of the embedding (width, vocabulary); None if none."""
        if self.embedding is not None and path == self.embedding[0]:
            vocabulary, width = self.embedding[1]
            return width, vocabulary
        return self.linears.get(path)
