"""``AdapterRetriever``: the adapters that fit a text, as LangChain documents."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig
from pydantic import ConfigDict, Field

from langchain_lora_hub.namespaces import with_namespace
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.faces.adapter_facts import hit_facts, purpose
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.retriever.query import check_k
from lora_hub_sdk.retriever.reranker import CANDIDATES
from lora_hub_sdk.types import DEFAULT_NAMESPACE, Hit, MinScore, Trust

_SEARCH: Final = (
    "k",
    "min_score",
    "base_model",
    "namespace",
    "exclude",
    "adapter_tags",
    "licenses",
    "scores",
    "min_trust",
    "rerank",
)


class AdapterRetriever(BaseRetriever):
    """Finds for a text the adapters that fit it, nearest first; each is a document.

    A document's text is the adapter's name and what it does; its metadata are what is known of the adapter, and its
    ``score`` (cosine), ``relevance`` and ``trust``. Every field but the hub may be given anew with a call
    (``retriever.invoke(text, k=5)``), and ``config={"configurable": {"namespace": ...}}`` sets the namespace of one
    call, also through a chain.

    Raises:
        ConfigurationError: at construction, for a k that no search could use.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    hub: LoraHub = Field(exclude=True)
    k: int = 3
    #: Hits below this cosine are left out.
    min_score: float | None = None
    base_model: str | Path | None = None
    namespace: str = DEFAULT_NAMESPACE
    exclude: tuple[str, ...] = ()
    #: Only adapters that carry all of these tags (``tags`` itself is LangChain's).
    adapter_tags: tuple[str, ...] = ()
    licenses: tuple[str, ...] = ()
    scores: tuple[MinScore, ...] = ()
    min_trust: Trust = "low"
    rerank: bool | None = None

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        check_k(self.k)

    def invoke(
        self,
        input: str,  # noqa: A002 (the name is LangChain's)
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        return super().invoke(input, config, **with_namespace(config, kwargs))

    async def ainvoke(
        self,
        input: str,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        return await super().ainvoke(input, config, **with_namespace(config, kwargs))

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **given: Any
    ) -> list[Document]:
        return self._documents(query, given)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **given: Any
    ) -> list[Document]:
        return await asyncio.to_thread(self._documents, query, given)

    def _documents(self, query: str, given: dict[str, Any]) -> list[Document]:
        return [self._document(hit) for hit in self._hits(query, given)]

    def _document(self, hit: Hit) -> Document:
        adapter = hit.adapter
        return Document(
            "\n".join(filter(None, (adapter.name, purpose(self.hub, adapter)))),
            id=f"{adapter.name}@{adapter.revision}",
            metadata=hit_facts(hit),
        )

    def _hits(self, query: str, given: dict[str, Any]) -> list[Hit]:
        unknown = sorted(given.keys() - {*_SEARCH})
        if unknown:
            raise ConfigurationError(
                f"{', '.join(unknown)}: cannot be given for one call; these can: {', '.join(_SEARCH)}"
            )
        value = {name: given.get(name, getattr(self, name)) for name in _SEARCH}
        k, floor = value.pop("k"), value.pop("min_score")
        check_k(k)
        value["tags"] = value.pop("adapter_tags")
        # Words may bring forward what the bound drops; then those behind come up.
        hits = self.hub.search(query, k if floor is None else max(k, CANDIDATES), **value)
        return [hit for hit in hits if floor is None or hit.score >= floor][:k]
