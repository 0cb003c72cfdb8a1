"""What the LLM and the chat model share: options for one call, shared batches, and what caches and tracers are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Final, Generic, Self, TypeVar

from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list
from pydantic import PrivateAttr, model_validator

from langchain_lora_hub.gathering import outcomes, read_aside
from langchain_lora_hub.identity import facts_of, fields_of
from langchain_lora_hub.namespaces import with_namespace
from langchain_lora_hub.together import Seat, Together
from lora_hub_sdk.engine.prompt import Template
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.faces.answer_fields import CALL, AnswerFields
from lora_hub_sdk.messages import Prompt
from lora_hub_sdk.types import Completion, Route

_Answer = TypeVar("_Answer")

PROVIDER: Final = "lora_hub"
#: What LangChain's models call some of our fields.
_STANDARD: Final = {"model": "base_model", "max_tokens": "max_new_tokens", "timeout": "timeout_s"}
#: Fields on which more than the fields of an identity depends.
_DEEP: Final = frozenset({"base_model", "bases", "strategy", "dtype", "device", "quantization"})


class HubModel(AnswerFields, Generic[_Answer]):
    """Mixed in before ``BaseLLM`` and ``BaseChatModel``.

    ``model``, ``max_tokens`` and ``timeout``, as other models call them, stand for ``base_model``, ``max_new_tokens``
    and ``timeout_s``, at construction and with each call.
    """

    #: What changes answers beside this model's fields, for one call; None until it is asked for.
    _facts: dict[str, Any] | None = PrivateAttr(None)
    #: Whether the namespace is that of one call, which the run around it must not change.
    _placed: bool = PrivateAttr(False)
    #: In the batch that one call belongs to.
    _seat: Seat | None = PrivateAttr(None)

    def __init__(self, **fields: Any) -> None:
        super().__init__(**_ours(fields))
        self.use_fields()

    def model_post_init(self, context: Any, /) -> None:
        # Without this, pydantic's own for private attributes would hide LangChain's.
        super().model_post_init(context)

    @model_validator(mode="after")
    def _set_lora_hub_version(self) -> Self:
        from lora_hub_sdk import __version__

        self._add_version("lora-hub-sdk", __version__)  # type: ignore[attr-defined]  # of BaseLanguageModel
        return self

    # -- what caches and tracers know it by ---------------------------------------------------------------------------

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """The key of LangChain's cache: everything that may change an answer, the registry's content included."""
        return {**(facts_of(self) if self._facts is None else self._facts), **fields_of(self, *self._more_fields)}

    @property
    def _more_fields(self) -> tuple[str, ...]:
        """Fields of the subclass that change an answer."""
        return ()

    async def _identified(self) -> Self:
        """This model for one call, with its facts: LangChain asks for them on the event loop, and they ask SQL."""
        if self._facts is not None:
            return self
        known = self.model_copy()
        known._facts = await asyncio.to_thread(facts_of, self)
        return known

    def _taken(self, kwargs: dict[str, Any]) -> tuple[Self, dict[str, Any]]:
        """This model with what is given for one call, and what of it is not one of its fields.

        LangChain's cache knows a model's fields, but not what they hold for a call, nor what functions are.
        """
        given = _ours(kwargs if self._placed else with_namespace(None, kwargs))
        own = {name: value for name, value in given.items() if name in (*CALL, "base_model", *self._more_fields)}
        rest = {name: value for name, value in given.items() if name not in own}
        if own.get("bases", self.bases) == "loaded":
            # Which they are must be the same where the cache is asked and where the prompt is routed.
            own["bases"] = self.hub.loaded_bases(self.settings) or "loaded"
        if not own:
            return self, rest
        taken = self.model_copy(update=own)
        if _DEEP & own.keys():
            taken._facts = None
        taken._placed = self._placed or "namespace" in own
        return taken, rest

    def _ls_params(self, kind: str, stop: Sequence[str] | None, given: dict[str, Any]) -> LangSmithParams:
        """The standard parameters of a trace."""
        given = _ours(given)
        model = given.get("base_model", self.base_model)
        params = LangSmithParams(
            ls_provider=PROVIDER,
            ls_model_name="auto" if model is None else str(model),
            ls_model_type=kind,  # type: ignore[typeddict-item]
            ls_temperature=given.get("temperature", self.temperature),
            ls_max_tokens=given.get("max_new_tokens", self.max_new_tokens),
        )
        if ends := list(stop or given.get("stop") or self.stop):
            params["ls_stop"] = ends
        return params

    # -- one prompt ---------------------------------------------------------------------------------------------------

    def explain(
        self,
        input: LanguageModelInput,  # noqa: A002 (the name is LangChain's)
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Route:
        """How an input would be answered, without answering it; it takes what ``invoke`` takes.

        Raises:
            As ``LoraHub.route``.
        """
        named, rest = self._taken(with_namespace(config, kwargs))
        asked = named.asked(named._options(rest))
        (route,) = self.hub.route(
            [named._prompt(input, rest)], base_model=asked["base_model"], routing=asked["routing"]
        )
        return route

    async def aexplain(
        self,
        input: LanguageModelInput,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Route:
        """As ``explain``, without blocking the event loop."""
        return await asyncio.to_thread(self.explain, input, config, **kwargs)

    def get_num_tokens(self, text: str) -> int:
        """How many tokens a text is for the base model, without any template.

        Raises:
            ConfigurationError: no base model is named, so that nobody can tell.
        """
        return self._count(text, None)

    def _count(self, prompt: Prompt, template: Template) -> int:
        if self.base_model is None:
            raise ConfigurationError("base_model=None: tokens differ from base to base; name one to have them counted")
        (count,) = self.hub.count_tokens(
            [prompt], base_model=self.base_model, template=template, settings=self.settings
        )
        return count

    def _prompt(self, given: LanguageModelInput, rest: Mapping[str, Any]) -> Prompt:
        """What the hub is asked."""
        raise NotImplementedError

    def _options(self, rest: Mapping[str, Any]) -> dict[str, Any]:
        """What of a call's keywords, after ``_taken``, is for ``asked`` to judge."""
        return dict(rest)

    def invoke(
        self,
        input: LanguageModelInput,  # noqa: A002 (the name is LangChain's)
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> _Answer:
        answer: _Answer = super().invoke(input, config, **with_namespace(config, kwargs))  # type: ignore[misc]
        return answer

    async def ainvoke(
        self,
        input: LanguageModelInput,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> _Answer:
        answer: _Answer = await super().ainvoke(input, config, **with_namespace(config, kwargs))  # type: ignore[misc]
        return answer

    def stream(
        self,
        input: LanguageModelInput,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Iterator[Any]:
        yield from super().stream(input, config, **with_namespace(config, kwargs))  # type: ignore[misc]

    async def astream(
        self,
        input: LanguageModelInput,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[Any]:
        known = await self._identified()
        pieces = super(HubModel, known).astream(input, config, **with_namespace(config, kwargs))  # type: ignore[misc]
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def _answers(self, prompts: Sequence[Prompt], asked: dict[str, Any]) -> list[Completion]:
        batch = self._seat.take() if self._seat is not None and len(prompts) == 1 else None
        if batch is None:
            return await self.hub.agenerate(prompts, **asked)
        return [await batch.answer(prompts[0], asked)]

    def _leave_batch(self) -> None:
        """Others need not wait for a call that is answered as a stream."""
        if self._seat is not None:
            self._seat.leave()

    # -- many prompts, which share the engine's batches ---------------------------------------------------------------

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[_Answer]:
        pairs = self._pairs(inputs, config, return_exceptions, kwargs, together=not return_exceptions)
        found = dict(pairs)
        return [found[place] for place in range(len(inputs))]

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[_Answer]:
        together = not return_exceptions
        async with aclosing(self._apairs(inputs, config, return_exceptions, kwargs, together=together)) as pairs:
            found = {place: answer async for place, answer in pairs}
        return [found[place] for place in range(len(inputs))]

    def batch_as_completed(
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[int, Any]]:
        """Each answer with its place, the first that is complete first; closing it gives the others up."""
        yield from self._pairs(inputs, config, return_exceptions, kwargs)

    async def abatch_as_completed(
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> AsyncIterator[tuple[int, Any]]:
        """Each answer with its place, the first that is complete first; closing it gives the others up."""
        async with aclosing(self._apairs(inputs, config, return_exceptions, kwargs)) as pairs:
            async for pair in pairs:
                yield pair

    def _pairs(
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None,
        return_exceptions: bool,
        kwargs: dict[str, Any],
        *,
        together: bool = False,
    ) -> Generator[tuple[int, Any]]:
        """As ``_apairs``. One thread waits for all answers, on an event loop of its own."""
        configs = get_config_list(config, len(inputs))
        if len(inputs) > 1:
            yield from read_aside(lambda: self._apairs(inputs, configs, return_exceptions, kwargs, together=together))
        elif inputs:
            answer: _Answer | Exception
            try:
                answer = self.invoke(inputs[0], configs[0], **kwargs)
            except Exception as error:
                if not return_exceptions:
                    raise
                answer = error
            yield 0, answer

    async def _apairs(
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None,
        return_exceptions: bool,
        kwargs: dict[str, Any],
        *,
        together: bool = False,
    ) -> AsyncGenerator[tuple[int, Any]]:
        """Each answer with its place.

        Args:
            together: whether an error of one is an error of all, so that one call of the hub may answer them.
        """
        configs = get_config_list(config, len(inputs))
        at_once = configs[0].get("max_concurrency") if configs else None
        limited = at_once is not None or getattr(self, "rate_limiter", None) is not None
        batch = Together(self.hub, len(inputs)) if together and len(inputs) > 1 and not limited else None
        known = await self._identified()

        async def answer(given: LanguageModelInput, own: RunnableConfig) -> Any:
            if batch is None:
                return await known.ainvoke(given, own, **kwargs)
            seated = known.model_copy()
            seated._seat = Seat(batch)
            try:
                return await seated.ainvoke(given, own, **kwargs)
            finally:
                seated._seat.leave()

        starts = [partial(answer, given, own) for given, own in zip(inputs, configs, strict=True)]
        async with aclosing(outcomes(starts, at_once=at_once, return_exceptions=return_exceptions)) as pairs:
            async for pair in pairs:
                yield pair


def _ours(given: dict[str, Any]) -> dict[str, Any]:
    """Fields by our names.

    Raises:
        ConfigurationError: one by both of its names.
    """
    for theirs, ours in _STANDARD.items():
        if theirs in given and ours in given:
            raise ConfigurationError(f"{theirs}={given[theirs]!r} and {ours}={given[ours]!r} are the same; give one")
    return {_STANDARD.get(name, name): value for name, value in given.items()}
