"""What several rooms' tests share: the real encoder, a tiny base model, and hubs that close themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# One line of text a process is enough; bars and notices would drown a failing test's own output.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny tensors gain nothing from threads, and lose much where other work shares the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.retriever.encoder import SentenceEncoder
from lora_hub_sdk.testing import tiny_base
from tests.servers import chroma_server as chroma_server
from tests.servers import postgres as postgres
from tests.servers import postgres_server as postgres_server

#: Evaluation material beside the project, where there is any; never on a user's machine.
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def encoder() -> SentenceEncoder:
    """The real MiniLM, loaded once."""
    return SentenceEncoder(resolve_model("all-minilm-l6-v2", offline=True))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama without a chat template."""
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def open_hub(tmp_path: Path, encoder: SentenceEncoder) -> Iterator[Callable[..., LoraHub]]:
    """Opens hubs on one database in the test's folder; closes what is left open."""
    opened: list[LoraHub] = []

    def open_one(**options: object) -> LoraHub:
        options = {"database": tmp_path / "hub.db", "encoder": encoder, "cache_dir": tmp_path / "cache", **options}
        opened.append(LoraHub(**options))  # type: ignore[arg-type]
        return opened[-1]

    yield open_one
    for hub in opened:
        hub.close()


@pytest.fixture
def hub(open_hub: Callable[..., LoraHub]) -> LoraHub:
    """An empty hub."""
    return open_hub()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The evaluation material."""
    if not SHARED.is_dir():
        pytest.skip("the evaluation material is not on this machine")
    return SHARED
