"""LangChain's own suites for chat models, on the embedded base model with the demo's adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_lora_hub import ChatLoraRetriever
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from lora_hub_sdk.demo import demo_adapters
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.retriever.encoder import SentenceEncoder
from tests.tool_caller import SAMPLES, TOOL_CALLER

BASE = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def demo_hub(tmp_path_factory: pytest.TempPathFactory, encoder: SentenceEncoder) -> Iterator[LoraHub]:
    with LoraHub(tmp_path_factory.mktemp("standard") / "hub.db", encoder=encoder, offline=True) as hub:
        for adapter in demo_adapters()[:3]:
            hub.register(adapter.folder, samples=adapter.samples, name=adapter.name, base_model=BASE)
        # Of itself so small a model makes no calls.
        hub.register(TOOL_CALLER, samples=SAMPLES, name="tool-caller", base_model=BASE)
        yield hub


class OnDemoHub:
    """What both suites are told of the model."""

    hub: ClassVar[LoraHub]

    @pytest.fixture(autouse=True)
    def _hub(self, demo_hub: LoraHub) -> None:
        type(self).hub = demo_hub

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatLoraRetriever

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"hub": self.hub, "model": BASE, "k": 2, "weights": "similarity"}


class TestUnit(OnDemoHub, ChatModelUnitTests):
    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        # Here is no key to give, and nothing that is tried again.
        return {"temperature": 0, "max_tokens": 100, "timeout": 60, "stop": []}


@pytest.mark.slow
class TestIntegration(OnDemoHub, ChatModelIntegrationTests):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**super().chat_model_params, "max_tokens": 200}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
