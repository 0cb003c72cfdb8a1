"""Tiny random models of many families, with tokenizers of many kinds: real files that load in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_hub_sdk.testing.tiny import ATTENTION, MLP, _byte_tokenizer

_SMALL: Final[Mapping[str, Any]] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
}
_GEMMA: Final = {**_SMALL, "sliding_window": 5, "head_dim": 8, "query_pre_attn_scalar": 8}
_EXPERTS: Final = {**_SMALL, "num_experts_per_tok": 2}
_BOS: Final = "<bos>"


@dataclass(frozen=True, slots=True)
class Family:
    """What sets a family's models apart for adapters; module names are short, as in ``target_modules``.

    Attributes:
        config: the class of its configuration in transformers, made with ``options``.
        attention, mlp: the linear modules of a layer that adapters may target.
        biased: those among them that have a bias.
        tied: the head's weight is the embedding's.
        transposed: its linear weights are stored as (in, out).
    """

    config: str
    options: Mapping[str, Any]
    attention: tuple[str, ...] = ATTENTION
    mlp: tuple[str, ...] = MLP
    biased: tuple[str, ...] = ()
    embedding: str = "embed_tokens"
    norms: tuple[str, ...] = ("input_layernorm",)
    tied: bool = False
    transposed: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        """Attention and MLP together."""
        return tuple(dict.fromkeys((*self.attention, *self.mlp)))


_PHI: Final = ("q_proj", "k_proj", "v_proj", "dense")
_OPT: Final = ("q_proj", "k_proj", "v_proj", "out_proj")
#: Sliding windows are shorter than most prompts. Of a mixture of experts only the attention has linear modules.
FAMILIES: Final[Mapping[str, Family]] = {
    "llama": Family("LlamaConfig", _SMALL),
    "qwen2": Family(
        "Qwen2Config",
        {**_SMALL, "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
        biased=("q_proj", "k_proj", "v_proj"),
    ),
    "qwen3": Family("Qwen3Config", {**_SMALL, "head_dim": 8}, norms=("q_norm", "input_layernorm")),
    "mistral": Family("MistralConfig", {**_SMALL, "sliding_window": 5}),
    "gemma2": Family("Gemma2Config", _GEMMA, tied=True),
    "gemma3": Family(
        "Gemma3TextConfig",
        {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
        norms=("k_norm", "input_layernorm"),
        tied=True,
    ),
    "phi": Family(
        "PhiConfig",
        {**_SMALL, "num_key_value_heads": 4},
        attention=_PHI,
        mlp=("fc1", "fc2"),
        biased=(*_PHI, "fc1", "fc2", "lm_head"),
    ),
    "phi3": Family("Phi3Config", _SMALL, attention=("qkv_proj", "o_proj"), mlp=("gate_up_proj", "down_proj")),
    "gpt2": Family(
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.25},
        attention=("c_attn", "c_proj"),
        mlp=("c_fc", "c_proj"),
        biased=("c_attn", "c_proj", "c_fc"),
        embedding="wte",
        norms=("ln_1", "ln_f"),
        tied=True,
        transposed=True,
    ),
    "gpt_neox": Family(
        "GPTNeoXConfig",
        {name: value for name, value in _SMALL.items() if name != "num_key_value_heads"},
        attention=("query_key_value", "dense"),
        mlp=("dense_h_to_4h", "dense_4h_to_h"),
        biased=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        embedding="embed_in",
    ),
    "opt": Family(
        "OPTConfig",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 256,
            "init_std": 0.25,
        },
        attention=_OPT,
        mlp=("fc1", "fc2"),
        biased=(*_OPT, "fc1", "fc2"),
        norms=("self_attn_layer_norm",),
        tied=True,
    ),
    "mixtral": Family("MixtralConfig", {**_EXPERTS, "num_local_experts": 4}, mlp=()),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        {**_EXPERTS, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16},
        mlp=(),
        norms=("q_norm", "input_layernorm"),
    ),
}


def tiny_family(
    folder: Path, family: str, *, seed: int = 0, tokenizer: Any = None, vocabulary: int | None = None
) -> Path:
    """Write a random model of a family (hidden size 32, 2 layers) with a byte-level tokenizer; returns the folder.

    Weights, biases and norms are all drawn, so nothing that an adapter could get wrong is hidden by a 0 or a 1, and
    greedy answers vary from prompt to prompt. Like most that are published, they are bfloat16 numbers.

    Args:
        family: a key of ``FAMILIES``.
        tokenizer: another than ``byte_tokenizer()``.
        vocabulary: rows of the embedding, as many as there are tokens unless given.
    """
    import torch
    import transformers

    tokenizer = tokenizer or byte_tokenizer()
    about = FAMILIES[family]
    config = getattr(transformers, about.config)(
        vocab_size=vocabulary or len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        tie_word_embeddings=about.tied,
        **about.options,
    )
    build: Any = transformers.AutoModelForCausalLM.from_config
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16())
        # A wide embedding that is also the head repeats every text's last token.
        embedding = model.get_input_embeddings()
        embedding.weight.div_(getattr(embedding, "scalar_embed_scale", 1.0)).copy_(embedding.weight.bfloat16())
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer(
    *, template: str | None = None, bos: bool = False, pad: bool = True, tokens: Sequence[str] = ()
) -> Any:
    """A byte-level tokenizer with an end mark.

    Args:
        template: its chat template.
        bos: it begins every text with ``<bos>``, unless asked for no special tokens.
        pad: it has a token for padding.
        tokens: further tokens at the end of its vocabulary.
    """
    from tokenizers.processors import TemplateProcessing

    made = _byte_tokenizer(chat=False)
    if tokens:
        made.add_tokens(list(tokens))
    if bos:
        made.add_special_tokens({"bos_token": _BOS})
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{_BOS} $A", special_tokens=[(_BOS, made.bos_token_id)]
        )
    if not pad:
        made.pad_token = None
    made.chat_template = template
    return made
