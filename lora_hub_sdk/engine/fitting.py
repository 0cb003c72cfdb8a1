"""Adapters made ready for one base model: what they need its weights for, computed once when they are loaded."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.composition.factors import BASE_COPY, AdapterFactors, LoraFactors
from lora_hub_sdk.engine.base_weights import is_quantized, is_transposed, is_turned, stored_weight
from lora_hub_sdk.engine.shapes import shape_of
from lora_hub_sdk.errors import NonFiniteWeightsError, UnsupportedFeatureError

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Numbers of a weight that are widened to float32 at a time.
_BLOCK: Final = 1 << 24
_CACHE_BYTES: Final = 512 << 20

Saved = dict[str, dict[str, "Tensor"]]


class Fitting:
    """Turns adapters, as their files hold them, into what the engine serves. Thread-safe; the base is only read.

    The principal parts of the base's weights, which PiSSA needs, are kept within ``cache_bytes``.

    Args:
        modules: the base model's, by path; their weights are as they were loaded.
        embedding: path of the input embedding.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], *, embedding: str | None, cache_bytes: int = _CACHE_BYTES
    ) -> None:
        self._modules = modules
        self._embedding = embedding
        self._tied = _tied(modules, embedding)
        self._principal = _Principal(cache_bytes)

    def fit(self, factors: AdapterFactors) -> AdapterFactors:
        """The same adapter with every ``magnitude`` None, "plain" ``init``, and only what differs in ``saved``.

        Returns ``factors`` itself where nothing has to be done.

        - DoRA (arXiv 2402.09353): the gain is m / ||W + s B A||, the norm of each output's weights, in float32.
        - PiSSA and OLoRA (arXiv 2404.02948, 2406.01775): the base lost s B0 A0 before training, so the adapter's change
          is s B A - s B0 A0, a plain LoRA of twice the rank.
        - A trained bias of a linear module becomes the shift by which it differs from the base's, beside factors of
          rank 0 where the module has no others.
        - Where the file holds a copy of the base's weight that is another one than the base's, the factors belong to
          that copy, and the module is saved as a whole.

        Raises:
            UnsupportedFeatureError: PiSSA or OLoRA on a quantized base, whose original weights are gone.
            NonFiniteWeightsError: a magnitude where the weights that it belongs to are all zero.
        """
        plain = all(one.magnitude is None for one in factors.modules.values())
        if plain and factors.init == "plain" and not factors.saved:
            return factors
        import torch

        with torch.no_grad():
            return self._fitted(factors)

    def _fitted(self, factors: AdapterFactors) -> AdapterFactors:
        saved, copies = self._sorted(factors)
        modules: dict[str, LoraFactors] = {}
        for path, one in factors.modules.items():
            module, copy = self._modules[path], copies.pop(path, None)
            # A copy is what was left of the base's weight, so nothing is to be given back.
            whole = copy is None and BASE_COPY not in factors.saved.get(path, {})
            if whole and factors.init != "plain" and path != self._embedding:  # PEFT begins an embedding's as ever
                one = self._restored(one, path, factors)
            if one.magnitude is not None:
                base = stored_weight(module) if copy is None else copy
                one = _gained(one, one.magnitude, base, is_transposed(module))
                if one.gain is not None and not one.gain.isfinite().all():
                    problem = f"the gains of {path} by its DoRA magnitudes are not finite"
                    raise NonFiniteWeightsError(f"adapter {factors.digest[:12]}", problem)
            bias = saved.get(path, {}).pop("bias", None)
            if bias is not None:
                shift = _shift(bias, module)
                one = replace(one, shift=shift if one.shift is None else one.shift + shift)
            if copy is None:
                modules[path] = one
            else:
                saved[path] = _whole(one, copy, module, path, factors)
        for path, copy in copies.items():
            saved.setdefault(path, {})["weight"] = copy
        for path, parameters in saved.items():
            shape = shape_of(self._modules[path]) if parameters.keys() == {"bias"} else None
            if shape is not None:  # a linear module's bias alone is no reason to compute its product again
                bias = parameters.pop("bias")
                a, b = bias.new_empty(0, shape[1]), bias.new_empty(shape[0], 0)
                modules[path] = LoraFactors(a, b, 1.0, shift=_shift(bias, self._modules[path]))
        saved = {path: parameters for path, parameters in saved.items() if parameters}
        return AdapterFactors(factors.digest, *_compact(modules, saved), converted=factors.init != "plain")

    def _sorted(self, factors: AdapterFactors) -> tuple[Saved, dict[str, Tensor]]:
        """What really differs from the base: parameters by path and name, and copies of base weights by path."""
        saved: Saved = {}
        copies: dict[str, Tensor] = {}
        for path, parameters in factors.saved.items():
            for name, tensor in parameters.items():
                parameter = "weight" if name == BASE_COPY else name
                if _equal(tensor, getattr(self._modules[path], parameter)):
                    continue
                if name == BASE_COPY:
                    copies[path] = tensor
                else:
                    turned = parameter == "weight" and is_turned(self._modules[path])
                    saved.setdefault(path, {})[name] = tensor.T if turned else tensor
        # A tied weight is one: who trained beside another one had it at both places.
        for path, copy in list(copies.items()):
            partner = self._tied.get(path)
            if partner is not None and "weight" not in factors.saved.get(partner, {}):
                copies.setdefault(partner, copy)
        return saved, copies

    def _restored(self, one: LoraFactors, path: str, factors: AdapterFactors) -> LoraFactors:
        import torch

        module = self._modules[path]
        if is_quantized(module):
            raise UnsupportedFeatureError(
                f"adapter {factors.digest[:12]}", f"{factors.init} on a quantized base model", path
            )
        weight = stored_weight(module).float()
        turned = is_transposed(module)
        rank = one.rank
        if factors.init == "olora":
            # The first columns of Q need only those of the weight; PEFT does not turn a transposed one.
            first = torch.linalg.qr(weight[:, :rank])[0]
            rest = first.T @ weight
            b0, a0 = (rest.T, first.T) if turned else (first, rest)
            b0 = one.scale * b0
        else:
            left, values, right = self._principal.of(path, weight.T if turned else weight, rank)
            root = (values / one.scale).sqrt()
            b0, a0 = one.scale * left * root, root[:, None] * right
        a0, b0 = a0.to(one.a.device), b0.to(one.b.device)
        return replace(
            one, a=torch.cat([one.a.float(), a0]), b=torch.cat([one.scale * one.b.float(), -b0], dim=1), scale=1.0
        )


class _Principal:
    """The largest singular values of base weights and their vectors, the least recently used ones forgotten."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._kept: OrderedDict[tuple[str, int], tuple[Tensor, Tensor, Tensor]] = OrderedDict()
        self._bytes = 0
        self._turn = threading.Lock()

    def of(self, path: str, weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Left vectors (d_out, rank), values (rank,) and right vectors (rank, d_in) of a float32 weight, on the CPU.

        Two threads that need the same ones do not compute them twice.
        """
        import torch

        with self._turn:
            if (path, rank) in self._kept:
                self._kept.move_to_end((path, rank))
                return self._kept[path, rank]
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            left, values, right = left[:, :rank], values[:rank], right[:rank]
            # A vector and its opposite are equally right: the same on every machine.
            signs = left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign()
            found = ((left * signs).cpu(), values.cpu().clone(), (right * signs.T).cpu())
            self._kept[path, rank] = found
            self._bytes += _bytes(found)
            while self._bytes > self._most and len(self._kept) > 1:
                self._bytes -= _bytes(self._kept.popitem(last=False)[1])
            return found


def _shift(bias: Tensor, module: nn.Module) -> Tensor:
    """By how much a trained bias differs from the base's."""
    own: Any = module.bias
    shift: Tensor = bias.float() - own.detach().to(bias.device).float()
    return shift


def _gained(one: LoraFactors, magnitude: Tensor, base: Tensor, turned: bool) -> LoraFactors:
    """The factors with a gain instead of DoRA's magnitude, beside this base weight, as it is stored."""
    a, b = one.a.float(), one.scale * one.b.float()
    norm = _norms(base, a.to(base.device), b.to(base.device), turned).to(a.device)
    gain = magnitude.float() / norm
    return replace(one, b=gain[:, None] * b, scale=1.0, gain=gain, magnitude=None)


def _norms(stored: Tensor, a: Tensor, b: Tensor, turned: bool) -> Tensor:
    """||W + B A|| of each output, a (d_out,) vector; a few rows of the stored weight are widened at a time."""
    import torch

    left, right = (a.T, b.T) if turned else (b, a)
    step = max(1, _BLOCK // stored.shape[1])
    squares = []
    for start in range(0, len(stored), step):
        rows = slice(start, start + step)
        squares.append(torch.addmm(stored[rows].float(), left[rows], right).square_().sum(dim=0 if turned else 1))
    total = torch.stack(squares).sum(dim=0) if turned else torch.cat(squares)
    return total.sqrt()


def _whole(one: LoraFactors, copy: Tensor, module: nn.Module, path: str, factors: AdapterFactors) -> dict[str, Tensor]:
    """A module's parameters with the adapter in them, where its factors belong to another weight than the base's."""
    import torch

    a, b = one.a.float(), one.scale * one.b.float()
    weight = copy.float()
    turned = is_transposed(module)
    if one.gain is not None:
        weight = weight * (one.gain if turned else one.gain[:, None])
    found = {"weight": torch.addmm(weight, a.T if turned else b, b.T if turned else a)}
    if one.shift is not None:
        own: Any = getattr(module, "bias", None)
        if own is None:
            feature = "a bias of lora_B beside another weight than the base model's"
            raise UnsupportedFeatureError(f"adapter {factors.digest[:12]}", feature, path)
        found["bias"] = own.detach().to(one.shift.device).float() + one.shift
    return found


def _compact(modules: dict[str, LoraFactors], saved: Saved) -> tuple[dict[str, LoraFactors], Saved]:
    """The same tensors, copied where they would keep a file alive of which they are less than half."""
    used: dict[int, int] = {}
    for tensor in AdapterFactors("", modules, saved).tensors():
        place = tensor.untyped_storage().data_ptr()
        used[place] = used.get(place, 0) + tensor.numel() * tensor.element_size()

    def own(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        storage = tensor.untyped_storage()
        return tensor.clone() if 2 * used[storage.data_ptr()] < storage.nbytes() else tensor

    return (
        {
            path: LoraFactors(own(one.a), own(one.b), one.scale, own(one.gain), own(one.shift))
            for path, one in modules.items()
        },
        {path: {name: own(one) for name, one in parameters.items()} for path, parameters in saved.items()},
    )


def _equal(own: Tensor, base: Any) -> bool:
    """Whether a stored parameter is the base's, as far as the narrower of their two dtypes tells."""
    import torch

    if base is None or not base.dtype.is_floating_point or own.shape != base.shape:
        return False
    own = own.to(base.device)
    return torch.equal(own.to(base.dtype), base) or torch.equal(base.to(own.dtype), own)


def _tied(modules: Mapping[str, nn.Module], embedding: str | None) -> dict[str, str]:
    """Embedding and head, each by the other's path, where they have one weight."""
    table: Any = modules.get(embedding or "")
    if table is None:
        return {}
    for path, module in modules.items():
        if module is not table and getattr(module, "weight", None) is table.weight:
            return {str(embedding): path, path: str(embedding)}
    return {}


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
