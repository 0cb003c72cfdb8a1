"""Calls that LangChain makes one by one, answered by one call of the hub."""

from __future__ import annotations

import asyncio
from typing import Any

from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.messages import Prompt
from lora_hub_sdk.types import Completion


class Together:
    """A batch whose prompts share one fate: they are asked at once, when each has come or has been let go.

    Some never come: a cache knew their answer, a handler wants theirs as a stream, or they make no sense.

    Args:
        count: how many calls the batch has.
    """

    def __init__(self, hub: LoraHub, count: int) -> None:
        self._hub = hub
        self._missing = count
        self._come: list[tuple[Prompt, dict[str, Any], asyncio.Future[Completion]]] = []
        self._asking: asyncio.Task[None] | None = None

    async def answer(self, prompt: Prompt, asked: dict[str, Any]) -> Completion:
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._come.append((prompt, asked, future))
        self.without_one()
        try:
            return await future
        except asyncio.CancelledError:
            self._give_up()
            raise

    def without_one(self) -> None:
        """One call fewer is waited for."""
        self._missing -= 1
        if not self._missing and self._come:
            self._asking = asyncio.create_task(self._ask())

    def _give_up(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
        for _, _, future in self._come:
            future.cancel()

    async def _ask(self) -> None:
        prompts, asked, futures = zip(*self._come, strict=True)
        # They may differ in these alone: the namespace is in the routing, all else is of the one call.
        each = {name: [call[name] for call in asked] for name in ("routing", "sampling", "timeout_s")}
        try:
            completions = await self._hub.agenerate(prompts, **{**asked[0], **each})
        except Exception as error:
            for future in futures:
                if not future.done():
                    future.set_exception(error)
        else:
            for future, completion in zip(futures, completions, strict=True):
                if not future.done():
                    future.set_result(completion)


class Seat:
    """One call's place in a batch, taken or left once."""

    def __init__(self, batch: Together) -> None:
        self._batch: Together | None = batch

    def take(self) -> Together | None:
        """The batch, for the first who asks."""
        batch, self._batch = self._batch, None
        return batch

    def leave(self) -> None:
        """The batch need not wait for this call, unless it has come already."""
        if (batch := self.take()) is not None:
            batch.without_one()
