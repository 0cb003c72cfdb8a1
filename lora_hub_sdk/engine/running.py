"""The model's side of the running rows: prompts that are being read, rows that decode together, and their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.engine.base_model import BaseModel
from lora_hub_sdk.engine.batch_lora import BatchLora, RowLora
from lora_hub_sdk.engine.kv_cache import RowsCache
from lora_hub_sdk.engine.lora_layers import LoraLayers
from lora_hub_sdk.engine.rank_pool import RankPool
from lora_hub_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

#: Layers whose whole state is keys and values by token.
_LAYERS: Final = frozenset({"full_attention", "sliding_attention"})
#: A prompt joins a group of longer ones while less than a quarter of the group, or so many places, is padding.
_PADDED: Final = 256


class Model:
    """A base model with a pool of adapters: every pass over it, of prompts and of steps.

    Raises:
        ConfigurationError: a model that keeps another state than keys and values, as a state-space model does.
    """

    def __init__(self, base: BaseModel, pool: RankPool) -> None:
        model: Any = base.model
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ()) - _LAYERS
        if not kinds and getattr(model, "_is_stateful", False):
            kinds = {"recurrent state"}
        if kinds:
            raise ConfigurationError(
                f"{base.id!r} has layers of {', '.join(sorted(kinds))}; only attention is supported"
            )
        self.base, self.pool, self.layers = base, pool, config.num_hidden_layers
        self._lora = LoraLayers(base.modules, base.products, pool, embedding=base.embedding)
        self._model = model
        # Masks that are ready are taken as they are; where layers differ in what they may see, the model makes its own.
        sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ()) or _window(config)
        self._ready_masks = model.config._attn_implementation == "sdpa" and not sliding
        self._keeps_logits = "logits_to_keep" in signature(model.forward).parameters
        head = model.get_output_embeddings()
        self._head = next((path for path, module in base.modules.items() if module is head), None)

    def forward(
        self, batch: BatchLora, ids: Tensor, mask: Tensor, positions: Tensor, cache: object, *, ready: bool = False
    ) -> Tensor:
        """One pass over ids (b, l); logits (b, vocabulary) after the last of them, float32."""
        if ready and self._ready_masks:
            mask = mask[:, None, None]
        options: dict[str, Any] = {"use_cache": True}
        # Weights for a whole prompt are found from all of its tokens, at the head too where an adapter has it.
        if self._keeps_logits and (batch.prompt is None or self._head not in self.pool.members):
            options["logits_to_keep"] = 1
        with self.base.turn, self._lora.apply(batch, ids.shape[1]):
            output = self._model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, **options
            )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def batch(self, rows: Sequence[RowLora], prompt: Tensor | None = None) -> BatchLora:
        """These rows' adapters, as a pass takes them; ``prompt`` as ``BatchLora`` has it."""
        return BatchLora(rows, device=self.base.device, dtype=self.base.dtype, gates=self.pool.gates, prompt=prompt)


class Prefill:
    """Prompts on their way into the cache, left-padded side by side, some of their columns at a time.

    All at once where a row has weights for its whole prompt, as these have to be known at the first token.

    Args:
        prompts: token ids, 1 or more each.
    """

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], loras: Sequence[RowLora]) -> None:
        import torch
        from transformers import DynamicCache

        base = model.base
        self._model = model
        self.loras = tuple(loras)
        self.lengths = [len(ids) for ids in prompts]
        width = max(self.lengths)
        padded = [[base.pad_id] * (width - len(ids)) + list(ids) for ids in prompts]
        self._ids = torch.tensor(padded, device=base.device)
        starts = torch.tensor([width - length for length in self.lengths], device=base.device)[:, None]
        self._mask = (torch.arange(width, device=base.device) >= starts).long()
        self._whole = any(row.kept is not None for row in loras)
        self._batch = model.batch(loras, self._mask.bool() if self._whole else None)
        self._positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        self._read = 0
        # Without the model's configuration it keeps every token, also those that a sliding layer no longer sees.
        self.cache: Any = DynamicCache()

    @property
    def places(self) -> int:
        """Rows x columns that are not read yet, padding included."""
        return int(self._ids.shape[0] * (self._ids.shape[1] - self._read))

    def advance(self, places: int) -> Tensor | None:
        """Read columns of at most so many places, and one at least; the logits once all are read."""
        first, (rows, last) = self._read, self._ids.shape
        if not self._whole:
            last = min(first + max(places // rows, 1), last)
        logits = self._model.forward(
            self._batch,
            self._ids[:, first:last],
            self._mask[:, :last],
            self._positions[:, first:last],
            self.cache,
        )
        self._read = last
        return logits if last == self._ids.shape[1] else None


class RunningRows:
    """The rows that decode together. A caller that keeps a list of them beside it drops with ``drop_places``."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._cache = RowsCache(model.layers)
        self._loras: list[RowLora] = []
        self._next: list[int] = []  # the position of each row's next token
        self._batch: BatchLora | None = None

    @property
    def cache_bytes(self) -> int:
        return self._cache.size_bytes

    @property
    def width(self) -> int:
        """Columns of the cache in use."""
        return self._cache.width

    def join(self, prefill: Prefill, keep: Sequence[int]) -> None:
        """Let the rows of a prefill that are at the indices ``keep`` in, after those that are there."""
        import torch

        if len(keep) < len(prefill.lengths):
            prefill.cache.batch_select_indices(torch.tensor(keep, device=self._model.base.device))
        lengths = [prefill.lengths[place] for place in keep]
        self._cache.join(prefill.cache, lengths)
        self._loras += [prefill.loras[place] for place in keep]
        self._next += lengths
        self._batch = None

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Logits (rows, vocabulary) after one more token in each row."""
        import torch

        device = self._model.base.device
        if self._batch is None:
            self._batch = self._model.batch(self._loras)
        self._cache.reserve_column()
        logits = self._model.forward(
            self._batch,
            torch.tensor(tokens, device=device)[:, None],
            self._cache.mask(device),
            torch.tensor(self._next, device=device)[:, None],
            self._cache.cache,
            ready=True,
        )
        self._cache.advance()
        self._next = [position + 1 for position in self._next]
        return logits

    def drop(self, places: Sequence[int]) -> None:
        """Take rows out; see ``drop_places``."""
        self._cache.drop(places)
        drop_places(self._loras, places)
        drop_places(self._next, places)
        self._batch = None


def drop_places(rows: list[Any], places: Sequence[int]) -> None:
    """From the last place to the first, the then last one moves to where one is taken out."""
    for place in sorted(places, reverse=True):
        rows[place] = rows[-1]
        rows.pop()


def places_to_read(piece: int, decoding: int, reading: int) -> int | None:
    """How many places of prompts are read before the rows that decode go on; None: all. Pure.

    A piece, or as many as there are prompts being read for each row that is held up: so a prompt that comes alone
    hardly slows the others down, and a crowd is not read in slices for the sake of the few that came first.
    """
    return piece * max(reading // decoding, 1) if decoding else None


def prefill_groups(lengths: Sequence[int]) -> list[list[int]]:
    """Which prompts are read side by side, by their places in ``lengths``: those of similar length. Pure."""
    groups: list[list[int]] = []
    total = 0
    for place in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        if groups:
            area = lengths[groups[-1][0]] * (len(groups[-1]) + 1)
            if area - total - lengths[place] <= max(_PADDED, area // 4):
                groups[-1].append(place)
                total += lengths[place]
                continue
        groups.append([place])
        total = lengths[place]
    return groups


def _window(config: Any) -> bool:
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
