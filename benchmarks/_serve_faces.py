"""Parts "langchain" and "batches": what LangChain's face costs beside the engine, and how calls end up in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from langchain_core.runnables import RunnableParallel
from langchain_lora_hub import ChatLoraRetriever, LoraRetrieverLLM

from benchmarks import _serve_pool as pool
from benchmarks._report import Asked, Report, machine, spread, throughput_ratio
from benchmarks._rounds import in_turns
from benchmarks._workload import Sizes
from lora_hub_sdk import LoraHub, ModelSettings, Routing, Sampling
from lora_hub_sdk.engine.request import Request

#: Throughput of the face / of what is beneath it.
ASKED_FACE: Final = Asked(0.95)


def measure_langchain(database: Path, base_model: str, dtype: Any, sizes: Sizes) -> Report:
    """The same prompts: by the engine with their routes given, by the hub, and by LangChain's models.

    All take the same k adapters, so that the engine and the faces do the same work; with retrieval, which the engine
    knows nothing of, the face stands beside the hub.
    """
    asked = pool.prompts(sizes.batch)
    settings, sampling = ModelSettings(dtype), Sampling(sizes.new_tokens)
    pinned = Routing(k=sizes.k, adapters=pool.THEMES[: sizes.k])
    with LoraHub(database, offline=True) as hub:
        fields = pool.options(dtype, base_model, sizes)
        llm: Any = LoraRetrieverLLM(hub=hub, adapters=pinned.adapters, **fields)
        chat: Any = ChatLoraRetriever(hub=hub, adapters=pinned.adapters, **fields)
        searching: Any = LoraRetrieverLLM(hub=hub, **fields)
        (route,) = hub.route(asked[:1], base_model=base_model, routing=pinned)
        engine = hub.engine(base_model, settings)
        requests = [Request(prompt, route, sampling) for prompt in asked]

        def by_hub(**given: Any) -> None:
            hub.generate(asked, base_model=base_model, sampling=sampling, settings=settings, **given)

        calls: dict[str, Callable[[], object]] = {
            "engine": lambda: engine.generate(requests),
            "hub": lambda: by_hub(routing=pinned),
            "LoraRetrieverLLM.batch": lambda: llm.batch(asked),
            "ChatLoraRetriever.batch": lambda: chat.batch(asked),
            "hub, retrieving": lambda: by_hub(routing=Routing(k=sizes.k)),
            "LoraRetrieverLLM.batch, retrieving": lambda: searching.batch(asked),
        }
        answers = engine.generate(requests)
        texts, tokens = [completion.text for completion in answers], pool.tokens_of(answers)
        same = {
            "LoraRetrieverLLM == engine": llm.batch(asked),
            "ChatLoraRetriever == engine": [message.text for message in chat.batch(asked)],
        }
        seconds = in_turns(calls, sizes.rounds)
    return Report(
        machine=machine(),
        settings={
            "part": "langchain",
            "base_model": base_model,
            "dtype": dtype,
            **asdict(sizes),
            "tokens": tokens,
        },
        systems={f"{name}, s": spread(taken) for name, taken in seconds.items()},
        ratios={
            "hub / engine": throughput_ratio(seconds, "hub", "engine"),
            **{
                f"{face} / engine": ASKED_FACE.of(throughput_ratio(seconds, face, "engine"))
                for face in ("LoraRetrieverLLM.batch", "ChatLoraRetriever.batch")
            },
            "LoraRetrieverLLM.batch / hub, both retrieving": ASKED_FACE.of(
                throughput_ratio(seconds, "LoraRetrieverLLM.batch, retrieving", "hub, retrieving")
            ),
        },
        agree={
            name: {"rows_equal": sum(a == b for a, b in zip(texts, other, strict=True)), "rows": len(texts)}
            for name, other in same.items()
        },
    )


def measure_batches(database: Path, base_model: str, dtype: Any, sizes: Sizes, *, calls: int) -> Report:
    """How many batches of prompts the engine reads for so many calls, by each way in which LangChain calls a model."""
    asked: list[Any] = list(pool.prompts(calls))
    systems: dict[str, dict[str, Any]] = {}
    with LoraHub(database, offline=True) as hub:
        engine = hub.engine(base_model, ModelSettings(dtype))
        for kind in (LoraRetrieverLLM, ChatLoraRetriever):
            model: Any = kind(hub=hub, **pool.options(dtype, base_model, sizes))
            model.batch(asked)  # all adapters are in memory from here on
            for way, call in _ways(model, asked).items():
                before = engine.batches
                answers = call()
                assert len(answers) == calls
                systems[f"{kind.__name__}: {way}"] = {
                    "calls": calls,
                    "engine batches": engine.batches - before,
                    "calls a batch": calls / (engine.batches - before),
                }
    return Report(
        machine=machine(),
        settings={"part": "batches", "base_model": base_model, "dtype": dtype, **asdict(sizes), "calls": calls},
        systems=systems,
        ratios={},
    )


def _ways(model: Any, asked: list[Any]) -> dict[str, Callable[[], Any]]:
    parallel: Any = RunnableParallel({str(place): _fixed(model, prompt) for place, prompt in enumerate(asked)})

    async def gathered() -> list[Any]:
        return list(await asyncio.gather(*(model.ainvoke(prompt) for prompt in asked)))

    def threads() -> list[Any]:
        with ThreadPoolExecutor(len(asked)) as threads:
            return list(threads.map(model.invoke, asked))

    return {
        "batch": lambda: model.batch(asked),
        "batch, return_exceptions": lambda: model.batch(asked, return_exceptions=True),
        "abatch": lambda: asyncio.run(model.abatch(asked)),
        "gathered ainvoke": lambda: asyncio.run(gathered()),
        "RunnableParallel.invoke": lambda: parallel.invoke(""),
        "RunnableParallel.ainvoke": lambda: asyncio.run(parallel.ainvoke("")),
        "batch_as_completed": lambda: list(model.batch_as_completed(asked)),
        "invoke from as many threads": threads,
    }


def _fixed(model: Any, prompt: str) -> Any:
    from langchain_core.runnables import RunnableLambda

    return RunnableLambda(lambda _: prompt) | model
