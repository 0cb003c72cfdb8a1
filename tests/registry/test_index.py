"""Every vector index against the suite that we ship for others."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Final

import pytest

from lora_hub_sdk.registry.chroma_index import ChromaIndex
from lora_hub_sdk.registry.exact_index import ExactIndex
from lora_hub_sdk.registry.index import VectorIndex
from lora_hub_sdk.registry.index_places import open_index
from lora_hub_sdk.testing.index_suite import VectorIndexSuite

_NUMBERS: Final = count()


class TestExactIndex(VectorIndexSuite):
    @pytest.fixture
    def index(self) -> VectorIndex:
        return open_index(None, "hub-x")


class TestChromaFolder(VectorIndexSuite):
    @pytest.fixture
    def index(self, tmp_path: Path) -> Iterator[VectorIndex]:
        opened = open_index(tmp_path / "index", "hub-x")
        assert isinstance(opened, ChromaIndex)
        yield opened
        opened.close()


class TestChromaServer(VectorIndexSuite):
    @pytest.fixture
    def index(self, chroma_server: str) -> Iterator[VectorIndex]:
        opened = open_index(chroma_server, f"index-{next(_NUMBERS)}")
        assert isinstance(opened, ChromaIndex)
        yield opened
        opened.close()


def test_exact_can_be_asked_for_by_name() -> None:
    assert isinstance(open_index("exact", "hub-x"), ExactIndex)
