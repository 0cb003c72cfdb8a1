"""What has been read of an answer so far, and the call that is being read."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Final
from uuid import uuid4

from lora_hub_sdk.chat.source import Source, Steps, UnreadableError
from lora_hub_sdk.messages import InvalidToolCall, Piece, ToolCall, ToolCallPiece

#: Models of one family use the other's word now and then.
_ARGUMENTS: Final = ("arguments", "parameters")
_CALL_KEYS: Final = ("type", "name", *_ARGUMENTS)


class Draft:
    """Text and calls of one answer, and the pieces of them that nobody has fetched yet.

    White space beside calls belongs to their form: it counts as text only between texts.
    """

    def __init__(self, tools: Collection[str]) -> None:
        self.tools = frozenset(tools)
        self.calls: list[ToolCall | InvalidToolCall] = []
        self._texts: list[str] = []
        self._space = ""
        self._beside_call = False
        self._pieces: list[Piece] = []

    @property
    def text(self) -> str:
        """All that was text."""
        return "".join(self._texts)

    def say(self, text: str) -> None:
        """Read as text."""
        for char in text:
            self._space += char
            if not char.isspace():
                self._put(self._space if self._texts or not self.calls else char)
                self._beside_call = False

    def call(self, source: Source, *, sure: bool = True) -> CallDraft:
        """A call begins here. Unless ``sure``, it may turn out to be text."""
        return CallDraft(self, source, sure=sure)

    def add(self, call: ToolCall | InvalidToolCall) -> None:
        """A call is over."""
        self.calls.append(call)
        self._beside_call = True

    def piece(self, piece: Piece) -> None:
        """Have something fetched."""
        self._pieces.append(piece)

    def fetch(self) -> list[Piece]:
        """The pieces since the last time; what belongs together is one."""
        pieces = [_joined([*some]) for _, some in groupby(self._pieces, _belongs_to)]
        self._pieces.clear()
        return pieces

    def close(self) -> None:
        """Nothing more comes."""
        if self._space and not self._beside_call:
            self._put(self._space)

    def _put(self, text: str) -> None:
        self._space = ""
        self._texts.append(text)
        self.piece(text)


class CallDraft:
    """One call. It is announced, by a piece with name and id, as soon as it is surely one and its name is known."""

    def __init__(self, draft: Draft, source: Source, *, sure: bool) -> None:
        self._draft = draft
        self._source = source
        self._from = len(source.taken)
        self._arguments_from: int | None = None
        self._sure = sure
        self._announced = False
        self._id = f"call_{uuid4().hex[:24]}"
        self._name: str | None = None
        self._parts: list[str] = []

    def read_object(self) -> Steps[None]:
        """Read ``{"name": …, "arguments": {…}}``, in any order of its keys.

        Raises:
            UnreadableError: it is none.
        """
        source = self._source
        yield from source.expect("{")
        after = ","
        while after == ",":
            yield from source.space()
            key = yield from self._string()
            if not self._sure and key not in _CALL_KEYS:
                raise UnreadableError(f"calls have no {key!r}")
            yield from source.space()
            yield from source.expect(":")
            yield from source.space()
            if key == "name":
                self.named((yield from self._string()))
            elif key in _ARGUMENTS:
                yield from self.read_arguments()
            else:
                yield from source.value(_ignore)
            yield from source.space()
            after = yield from source.expect(",", "}")

    def read_arguments(self) -> Steps[None]:
        """Read the arguments' JSON.

        Raises:
            UnreadableError: it is none, or there were some already.
        """
        if self._arguments_from is not None:
            raise UnreadableError("it has arguments twice")
        self._arguments_from = len(self._source.taken)
        self._announce()
        yield from self._source.value(self._write)

    def named(self, name: str) -> None:
        """The name is known.

        Raises:
            UnreadableError: it was known already.
        """
        if self._name is not None:
            raise UnreadableError("it has two names")
        # Half a surrogate pair, which JSON can spell, could not be sent on.
        self._name = name.encode(errors="replace").decode()
        self._announce()

    def close(self) -> None:
        """It was read to its end."""
        if self._arguments_from is None:
            if not self.sure:
                return self._as_text()
            self._sure = True
            self._announce()
        if not self._parts:
            self._arguments_from = len(self._source.taken)
            self._write("{}")
        self._end(self._error())

    def fail(self, error: UnreadableError) -> None:
        """It cannot be read; what was taken until now belongs to it."""
        if not self.sure:
            return self._as_text()
        self._sure = True
        if self._arguments_from is None:
            rest = self._taken(self._from).strip()
        else:
            rest = self._taken(self._arguments_from + len(self._arguments)).rstrip()
        self._announce()
        self._write(rest)
        self._end(f"this is no call that can be read: {error}")

    @property
    def sure(self) -> bool:
        """Whether it can no longer turn out to be text."""
        return self._sure or self._name in self._draft.tools

    @property
    def _arguments(self) -> str:
        return "".join(self._parts)

    def _taken(self, since: int) -> str:
        return "".join(self._source.taken[since:])

    def _as_text(self) -> None:
        self._draft.say(self._taken(self._from))

    def _error(self) -> str | None:
        if self._name is None:
            return "it has no name"
        if self._name not in self._draft.tools:
            return f"there is no tool {self._name!r}; there are: {', '.join(sorted(self._draft.tools)) or 'none'}"
        try:
            arguments = json.loads(self._arguments)
        except (ValueError, RecursionError) as error:
            return f"its arguments are no JSON: {error}"
        return (
            None
            if isinstance(arguments, dict)
            else f"its arguments are no JSON object, but a {type(arguments).__name__}"
        )

    def _end(self, error: str | None) -> None:
        self._announce(at_last=True)
        if error is None:
            assert self._name is not None, "a call without a name has an error"
            self._draft.add(ToolCall(self._name, self._arguments, self._id))
        else:
            self._draft.add(InvalidToolCall(self._name, self._arguments, self._id, error))

    def _announce(self, *, at_last: bool = False) -> None:
        if self._arguments_from is not None and self._name is not None:
            self._sure = True
        if not self._announced and (at_last or (self._sure and self._name is not None)):
            self._announced = True
            self._draft.piece(ToolCallPiece(len(self._draft.calls), self._name, self._id, self._arguments))

    def _write(self, text: str) -> None:
        self._parts.append(text)
        if self._announced and text:
            self._draft.piece(ToolCallPiece(len(self._draft.calls), arguments=text))

    def _string(self) -> Steps[str]:
        chars: list[str] = []
        yield from self._source.string(chars.append)
        try:
            return str(json.loads("".join(chars)))
        except ValueError as error:
            raise UnreadableError(f"its JSON has a text that is none: {error}") from None


def _belongs_to(piece: Piece) -> int:
    return -1 if isinstance(piece, str) else piece.index


def _joined(pieces: Sequence[Piece]) -> Piece:
    first = pieces[0]
    if isinstance(first, str):
        return "".join(piece for piece in pieces if isinstance(piece, str))
    arguments = "".join(piece.arguments for piece in pieces if isinstance(piece, ToolCallPiece))
    return replace(first, arguments=arguments)


def _ignore(_: str) -> None:
    pass
