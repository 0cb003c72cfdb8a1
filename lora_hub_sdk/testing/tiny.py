"""A tiny random base model and tiny random adapters: real files that transformers and PEFT load in milliseconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.types import DEFAULT_NAMESPACE, Adapter

if TYPE_CHECKING:
    from torch import Tensor

    from lora_hub_sdk.registry.admission import ModuleShapes

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
) -> Path:
    """Write a random LoRA in PEFT's format for any local base model; returns the folder.

    Args:
        base: folder of the base model; only its configuration is read.
        modules: short names of the target modules.
        layers: only these layers, None for all.
        base_name: what the configuration names as its base, the folder unless given.
    """
    import torch
    from safetensors.torch import save_file

    from lora_hub_sdk.engine.shapes import module_shapes
    from lora_hub_sdk.registry.adapter_config import parse_adapter_config

    raw = _config(base_name or str(base), rank, alpha, modules, rslora, rank_pattern or {}, alpha_pattern or {})
    config = parse_adapter_config(raw, folder.name)
    random = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        values: Tensor = torch.randn(*size, generator=random) / size[1] ** 0.5
        wanted: torch.dtype = getattr(torch, dtype)
        return values.to(wanted).contiguous()

    tensors = {}
    for path, (out_features, in_features) in module_shapes(base).items():
        if path.rpartition(".")[2] not in modules or not _in_layers(path, layers):
            continue
        width = config.rank(path)
        tensors[f"base_model.model.{path}.lora_A.weight"] = draw(width, in_features)
        tensors[f"base_model.model.{path}.lora_B.weight"] = draw(out_features, width)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(raw, indent=2))
    return folder


def unregistered(folder: Path, shapes: ModuleShapes, *, id: int = 1) -> Adapter:  # noqa: A002
    """An admitted adapter as the engine takes it, without a registry; ``shapes`` as ``engine.shapes`` gives them."""
    from lora_hub_sdk.registry.admission import admit

    admitted = admit(folder, source=folder.name, shapes=shapes)
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
    """A (r, d_in), B (d_out, r) and the scale of every module of an adapter, by module path.

    Reads the files by itself, independent of the package's own scales, so that tests can compare with it.
    """
    from math import sqrt

    from safetensors.torch import load_file

    raw = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    factors = {}
    for key in tensors:
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = tensors[key].float(), tensors[key.replace(".lora_A.", ".lora_B.")].float()
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


def _config(
    base: str,
    rank: int,
    alpha: float,
    modules: Sequence[str],
    rslora: bool,
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "rank_pattern": dict(rank_pattern),
        "alpha_pattern": dict(alpha_pattern),
        "target_modules": list(modules),
        "bias": "none",
        "init_lora_weights": True,
    }


def _in_layers(path: str, layers: Sequence[int] | None) -> bool:
    return layers is None or any(f".layers.{layer}." in path for layer in layers)
