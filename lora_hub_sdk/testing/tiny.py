"""A tiny random base model and tiny random adapters: real files that transformers and PEFT load in milliseconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.types import DEFAULT_NAMESPACE, Adapter

if TYPE_CHECKING:
    from torch import Tensor

    from lora_hub_sdk.registry.layout import BaseLayout

ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP: Final = ("gate_proj", "up_proj", "down_proj")
_EOS: Final = "<eos>"
_PAD: Final = "<pad>"
_CHAT: Final = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_base(folder: Path, *, seed: int = 0, layers: int = 2, context: int = 256, chat: bool = False) -> Path:
    """Write a random Llama (hidden size 32, grouped-query attention) with a byte-level tokenizer; returns the folder.

    Weights are drawn wide enough for greedy answers to vary from prompt to prompt.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _byte_tokenizer(chat)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.25,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_encoder(folder: Path, *, seed: int = 0, context: int = 192) -> Path:
    """Write a random sentence-transformers encoder (hidden size 32, mean pooling, bytes); returns the folder.

    Untrained as it is, its vectors tell texts apart by their bytes; it trains in seconds.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel

    tokenizer = _byte_tokenizer(False)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=context,
        initializer_range=0.25,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config)
    parts = folder / "transformer"
    model.save_pretrained(parts)
    tokenizer.model_max_length = context
    tokenizer.save_pretrained(parts)
    reader = Transformer(str(parts), max_seq_length=context)
    SentenceTransformer(modules=[reader, Pooling(32), Normalize()], device="cpu").save_pretrained(
        str(folder), create_model_card=False
    )
    shutil.rmtree(parts)
    return folder


def tiny_adapter(
    folder: Path,
    base: Path,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    seed: int = 0,
    modules: Sequence[str] = ("q_proj", "v_proj"),
    layers: Sequence[int] | None = None,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    dtype: str = "float32",
    base_name: str | None = None,
    dora: bool = False,
    lora_bias: bool = False,
    bias: str = "none",
    modules_to_save: Sequence[str] = (),
    init: bool | str = True,
) -> Path:
    """Write a random LoRA as PEFT would for any local base model; returns the folder.

    The base's weights are read only where something of the adapter has to lie near them.

    Args:
        base: folder of the base model.
        modules: short names or paths of the target modules, the input embedding and the head among them.
        layers: only these layers, None for all.
        base_name: what the configuration names as its base, the folder unless given.
        dora: with magnitudes near the norms of the base's weights.
        lora_bias: with a bias of each B.
        bias: "all" or "lora_only": with changed biases of the base.
        modules_to_save: short names or paths of modules that are saved whole, with changed weights.
        init: "pissa" or "olora": the factors lie near those that PEFT would begin with.
    """
    import torch
    from safetensors.torch import save_file

    from lora_hub_sdk.engine.shapes import module_layout
    from lora_hub_sdk.registry.adapter_config import parse_adapter_config

    layout = module_layout(base)
    targets = [path for path in (*layout.linears, *(layout.embedding or ())[:1]) if _named(path, modules, layers)]
    raw = {
        "base_model_name_or_path": base_name or str(base),
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "rank_pattern": dict(rank_pattern or {}),
        "alpha_pattern": dict(alpha_pattern or {}),
        # A path in full holds in any layer, and in none.
        "target_modules": targets if layers is not None else list(modules),
        "layers_to_transform": None if layers is None else list(layers),
        "bias": bias,
        "init_lora_weights": init,
        "use_dora": dora,
        "lora_bias": lora_bias,
        "modules_to_save": list(modules_to_save) or None,
        "fan_in_fan_out": any(_is_transposed(layout, path) for path in targets),
    }
    config = parse_adapter_config(raw, folder.name)
    random = torch.Generator().manual_seed(seed)
    wanted: torch.dtype = getattr(torch, dtype)

    def draw(*size: int) -> Tensor:
        values: Tensor = torch.randn(*size, generator=random) / size[-1] ** 0.5
        return values

    tensors = {}
    for path in targets:
        out_features, in_features = layout.factors(path) or (0, 0)
        width = config.rank(path)
        kind, tail = ("embedding_", "") if layout.embedding and path == layout.embedding[0] else ("", ".weight")
        tensors[f"{path}.lora_{kind}A{tail}"] = draw(width, in_features)
        tensors[f"{path}.lora_{kind}B{tail}"] = draw(out_features, width)
    near = dora or bias != "none" or modules_to_save or isinstance(init, str) or _copied(targets)
    if near:
        weights = _parameters(base)
        for path in targets:
            weights[f"{path}.weight"] = _lay_near(
                tensors, path, weights[f"{path}.weight"], config.scale(path), layout, draw, dora, init
            )
        tensors |= _replaced(targets, weights, layout, draw, bias, modules_to_save)
    if lora_bias:
        tensors |= {f"{path}.lora_B.bias": draw(layout.linears[path][0]) for path in targets}
    folder.mkdir(parents=True, exist_ok=True)
    stored = {f"base_model.model.{key}": tensor.to(wanted).contiguous().clone() for key, tensor in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(raw, indent=2))
    return folder


def unregistered(folder: Path, layout: BaseLayout, *, id: int = 1) -> Adapter:  # noqa: A002
    """An admitted adapter as the engine takes it, without a registry; ``layout`` as ``engine.shapes`` gives it."""
    from lora_hub_sdk.registry.admission import admit

    admitted = admit(folder, source=folder.name, layout=layout)
    return Adapter(
        id=id,
        name=folder.name,
        namespace=DEFAULT_NAMESPACE,
        repo_id=str(folder),
        revision=admitted.digest[:40],
        digest=admitted.digest,
        base_model=admitted.config.base_model,
        rank=admitted.max_rank,
        alpha=admitted.config.alpha,
        target_modules=admitted.target_modules,
        size_bytes=admitted.size_bytes,
        license=None,
        description=None,
        tags=(),
        folder=folder,
        sample_count=0,
        created_at=(now := datetime.now(UTC)),
        updated_at=now,
    )


def raw_factors(folder: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A (r, d_in), B (d_out, r) and the scale of every module of an adapter, by module path, as they are stored.

    Reads the files by itself, independent of the package's own scales, so that tests can compare with it.
    """
    from math import sqrt

    from safetensors.torch import load_file

    raw = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    factors = {}
    for key in tensors:
        if not key.endswith((".lora_A.weight", ".lora_embedding_A")):
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A")
        a, b = tensors[key].float(), tensors["_B".join(key.rsplit("_A", 1))].float()
        own = [value for end, value in (raw.get("alpha_pattern") or {}).items() if module.endswith(end)]
        alpha = float(own[0] if own else raw["lora_alpha"])
        factors[module] = (a, b, alpha / (sqrt(a.shape[0]) if raw.get("use_rslora") else a.shape[0]))
    return factors


def _byte_tokenizer(chat: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate([_PAD, _EOS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    build: Any = PreTrainedTokenizerFast
    fast = build(tokenizer_object=tokenizer, eos_token=_EOS, pad_token=_PAD)
    fast.chat_template = _CHAT if chat else None
    return fast


def _named(path: str, names: Sequence[str], layers: Sequence[int] | None = None) -> bool:
    """Whether a module is among those meant by these names, and in one of these layers."""
    parts = path.split(".")
    inside = layers is None or path in names or any(part.isdecimal() and int(part) in layers for part in parts)
    return inside and (path in names or parts[-1] in names)


def _is_transposed(layout: BaseLayout, path: str) -> bool:
    """Whether the base stores this linear's weight as (in, out): a square one does where any other does."""
    inner = _inner(layout)
    return path in inner and any(layout.parameters[one]["weight"] != layout.linears[one] for one in inner)


def _copied(targets: Sequence[str]) -> bool:
    """Whether PEFT saves the base's own weights of embedding and head too: where these have their usual names."""
    return any(path.rpartition(".")[2] in ("embed_tokens", "lm_head") for path in targets)


def _parameters(base: Path) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    from lora_hub_sdk.models.loading import LOADING

    with LOADING:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    return {name: value.detach() for name, value in model.named_parameters(remove_duplicate=False)}


def _lay_near(
    tensors: dict[str, Tensor],
    path: str,
    weight: Tensor,
    scale: float,
    layout: BaseLayout,
    draw: Callable[..., Tensor],
    dora: bool,
    init: bool | str,
) -> Tensor:
    """Turn a target's random factors into what training would have made of PEFT's first ones.

    Returns what PEFT leaves of the base's weight, as the base stores it.
    """
    import torch

    linear = path in layout.linears
    turned = _is_transposed(layout, path) or not linear
    if turned:
        weight = weight.T
    kind, tail = ("", ".weight") if linear else ("embedding_", "")
    key_a, key_b = f"{path}.lora_{kind}A{tail}", f"{path}.lora_{kind}B{tail}"
    a, b = tensors[key_a], tensors[key_b]
    if linear and init == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        root = (values[: len(a)] / scale).sqrt()
        first_a, first_b = root[:, None] * right[: len(a)], left[:, : len(a)] * root
    elif linear and init == "olora":
        left, right = torch.linalg.qr(weight)
        first_a, first_b = right[: len(a)], left[:, : len(a)]
    else:
        first_a, first_b = torch.zeros_like(a), torch.zeros_like(b)
    if isinstance(init, str):
        tensors[key_a], tensors[key_b] = first_a + 0.1 * a, first_b + 0.1 * b
    if dora:
        tensors[f"{path}.lora_magnitude_vector"] = weight.norm(dim=1) * (1 + draw(weight.shape[0], 100)[:, 0])
    weight = weight - scale * first_b @ first_a
    return weight.T if turned else weight


def _replaced(
    targets: Sequence[str],
    weights: Mapping[str, Tensor],
    layout: BaseLayout,
    draw: Callable[..., Tensor],
    bias: str,
    modules_to_save: Sequence[str],
) -> dict[str, Tensor]:
    """What stands in an adapter's file in place of the base's own: saved modules, biases, copies."""

    def changed(value: Tensor) -> Tensor:
        size = max(float(value.abs().mean()) / 4, 0.02)
        return value + size * draw(value.numel(), 1).view(value.shape)

    found = {}
    for name, value in weights.items():
        path, _, parameter = name.rpartition(".")
        parents = [path.split(".")[: end + 1] for end in range(path.count(".") + 1)]
        if any(".".join(parent).endswith(tuple(modules_to_save)) for parent in parents):  # as PEFT finds them
            found[name] = changed(value)
        elif parameter == "bias" and (bias == "all" or (bias == "lora_only" and path in targets)):
            found[f"{path}.base_layer.bias" if path in targets else name] = changed(value)
        elif parameter == "weight" and path in targets and _copied(targets) and path not in _inner(layout):
            found[f"{path}.base_layer.weight"] = value
    return found


def _inner(layout: BaseLayout) -> set[str]:
    """The linear modules without the head."""
    return set(layout.linears) - {layout.head or ""}
