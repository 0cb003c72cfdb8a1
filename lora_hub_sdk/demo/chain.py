"""The demo's LangChain chain, and a callback handler that keeps each prompt's route while the chain passes on text.

Imports langchain-core: import this module only where the extra is known to be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import LLMResult
from langchain_core.prompts import PromptTemplate

from lora_hub_sdk import LoraRetrieverLLM
from lora_hub_sdk.types import RouteDict


class RouteCollector(BaseCallbackHandler):
    """Keeps the route of every prompt that a ``LoraRetrieverLLM`` answers, by the prompt's text."""

    def __init__(self) -> None:
        self.routes: dict[str, RouteDict] = {}
        self._prompts: dict[UUID, list[str]] = {}

    def on_llm_start(self, serialized: dict[str, Any], prompts: list[str], *, run_id: UUID, **kwargs: Any) -> None:
        self._prompts[run_id] = prompts

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        for prompt, generations in zip(self._prompts.pop(run_id), response.generations, strict=True):
            info = generations[0].generation_info or {}
            self.routes[prompt] = info["route"]


def ask(llm: LoraRetrieverLLM, prompts: Sequence[str], **options: Any) -> list[tuple[str, RouteDict]]:
    """Answer and route of each prompt, through a chain as an application would have it; one batch of the engine.

    Args:
        options: fields of the model to change for this call, like ``strategy="base"``.
    """
    collector = RouteCollector()
    answering = PromptTemplate.from_template("{question}") | llm.bind(**options) | StrOutputParser()
    answers = answering.batch([{"question": prompt} for prompt in prompts], config={"callbacks": [collector]})
    return [(answer, collector.routes[prompt]) for prompt, answer in zip(prompts, answers, strict=True)]
