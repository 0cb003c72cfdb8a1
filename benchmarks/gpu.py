"""What composing costs on a GPU: a model of Llama-2-7B's shape with random weights in bfloat16, built on the device.

python -m benchmarks.gpu --json
python -m benchmarks.gpu --device cpu --hidden 64 --layers 2 --rounds 1     # the same, small enough for any machine
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, cast

from benchmarks._engine_memory import measure_memory
from benchmarks._report import Asked
from benchmarks._workload import IdTokenizer, Model, Sizes, endless, random_adapters
from benchmarks.compose import RATIOS, measure
from lora_hub_sdk.engine.base_model import BaseModel

#: Llama-2-7B; a model of another ``--hidden`` keeps the proportions.
_HIDDEN: Final = 4096
_INTERMEDIATE: Final = 11008
_LAYERS: Final = 32
_HEAD: Final = 128
_CONTEXT: Final = 4096
_VOCABULARY: Final = 32000
_BATCHES: Final = (32, 64)
_ASKED: Final = {**RATIOS, ("mixture", "base"): Asked(0.9)}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(
            f"--device {options.device}: this machine shows no CUDA device; "
            "try --device cpu --hidden 64 --layers 2, which measures nothing of use but runs"
        )
    torch.set_num_threads(options.threads)
    sizes = Sizes.of(options)
    with TemporaryDirectory(prefix="lora-hub-bench-") as temporary:
        model = random_llama(Path(temporary) / "base", options.hidden, options.layers, options.device)
        adapters = random_adapters(Path(temporary), model.folder, sizes.adapters, sizes.rank, dtype="bfloat16")
        for batch in options.batches:
            of_batch = replace(sizes, batch=batch)
            for report in (
                measure(model, adapters, of_batch, asked=_ASKED),
                measure_memory(model, adapters, of_batch),
            ):
                if options.json:
                    print(report.as_json(), flush=True)
                else:
                    report.show()


def random_llama(folder: Path, hidden: int, layers: int, device: str) -> Model:
    """A Llama with random weights; its configuration is written to ``folder``, its weights never leave the device."""
    from transformers import LlamaConfig

    heads = max(hidden // _HEAD, 2)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * _INTERMEDIATE // _HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=_CONTEXT,
    )
    config.save_pretrained(folder)
    name = f"llama-{hidden}x{layers}-random"
    return Model(name, folder, "bfloat16", lambda: endless(_built(name, folder, device)))


def _built(name: str, folder: Path, device: str) -> BaseModel:
    """The same weights each time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    on, dtype = torch.device(device), torch.bfloat16
    torch.manual_seed(0)
    with on:
        model = build(AutoConfig.from_pretrained(folder), dtype=dtype).eval().requires_grad_(False)
    return BaseModel(
        id=name,
        model=model,
        tokenizer=cast(Any, IdTokenizer()),
        device=on,
        dtype=dtype,
        context=_CONTEXT,
        eos_ids=frozenset(),
        pad_id=0,
        modules=dict(model.named_modules()),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON for each report instead of tables")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--hidden", type=int, default=_HIDDEN, help="width of the model")
    parser.add_argument("--layers", type=int, default=_LAYERS, help="of the model")
    parser.add_argument("--batches", type=int, nargs="+", default=_BATCHES, help="rows; instead of --batch")
    Sizes.add_options(parser, Sizes(shortest=64, rank=8, rounds=3))
    return parser


if __name__ == "__main__":
    main()
