from __future__ import annotations

from typing import Any

import pytest

from lora_hub_sdk.errors import SamplesError
from lora_hub_sdk.retriever.samples import sample_texts


def test_texts_and_rows_in_order_without_blanks_and_repetitions() -> None:
    given: list[Any] = ["b", {"inputs": " a ", "targets": "x"}, "", "b", "  ", {"inputs": "c"}]
    assert sample_texts(given, "mine") == ("b", "a", "c")


@pytest.mark.parametrize(
    "samples", [[], ["", "  "], [{"inputs": ""}], "one string", {"inputs": "x"}, [7], [{"text": "x"}], [None]]
)
def test_anything_else_is_refused(samples: Any) -> None:
    with pytest.raises(SamplesError, match="mine"):
        sample_texts(samples, "mine")
