"""Models that are loaded at the same time are each whole, and of the dtype that was asked for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lora_hub_sdk.engine.base_model import DType, ModelSettings, load_base_model
from lora_hub_sdk.engine.shapes import module_layout
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.retriever.encoder import SentenceEncoder
from lora_hub_sdk.testing import tiny_encoder


def test_loading_many_models_at_once_spoils_none(base: Path, tmp_path: Path) -> None:
    encoder = resolve_model(tiny_encoder(tmp_path / "encoder"))
    expected = SentenceEncoder(encoder).encode(["some text"])
    layout = module_layout(base)

    def load(dtype: DType) -> None:
        for _ in range(15):
            model = load_base_model(resolve_model(base), ModelSettings(dtype)).model
            for parameter in model.parameters():
                assert not parameter.is_meta
                assert parameter.dtype == getattr(torch, dtype)

    def encode() -> None:
        for _ in range(15):
            assert (SentenceEncoder(encoder).encode(["some text"]) == expected).all()
            assert module_layout(base) == layout

    with ThreadPoolExecutor(3) as threads:
        for job in [threads.submit(load, "bfloat16"), threads.submit(load, "float32"), threads.submit(encode)]:
            job.result()
    assert torch.get_default_dtype() == torch.float32
