"""An answer's text as it is read: one character at a time, which may not have come yet, and JSON within it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Final, TypeVar

T = TypeVar("T")
#: Asks for one character with each ``yield``, and is sent it; "" is the end.
Steps = Generator[None, str, T]
_SPACE: Final = " \t\n\r"
#: Numbers, true, false and null are made of these.
_SCALAR: Final = frozenset("-+.0123456789eEtrufalsn")
#: Whoever parses what was read would fail on much more in ways of his own.
_DEPTH: Final = 200
_CLOSING: Final = {"{": "}", "[": "]"}


class UnreadableError(Exception):
    """What comes cannot be, or become, what is read. Never leaves this package."""


class Source:
    """What comes next. ``taken`` has the characters taken so far; markers are passed, and not among them."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self._ahead = ""
        self._ended = False

    def peek(self) -> Steps[str]:
        """The next character, which stays; "" at the end."""
        if not self._ahead:
            yield from self._more()
        return self._ahead[:1]

    def take(self) -> Steps[str]:
        """The next character; "" at the end."""
        char = yield from self.peek()
        if char:
            self._ahead = self._ahead[1:]
            self.taken.append(char)
        return char

    def at(self, *markers: str) -> Steps[str]:
        """The marker that comes next, which is passed; "" where none of them does, and nothing is passed."""
        while True:
            for marker in markers:
                if self._ahead.startswith(marker):
                    self._ahead = self._ahead[len(marker) :]
                    return marker
            if self._ended or not any(marker.startswith(self._ahead) for marker in markers):
                return ""
            yield from self._more()

    def skip_to(self, *markers: str) -> Steps[str]:
        """Take what comes before the nearest marker, and pass that; "" at the end."""
        while True:
            marker = yield from self.at(*markers)
            if marker or not (yield from self.take()):
                return marker

    def space(self, pass_on: Callable[[str], None] | None = None) -> Steps[None]:
        """Take white space."""
        while (yield from self.peek()) in (*_SPACE,):
            char = yield from self.take()
            if pass_on is not None:
                pass_on(char)

    def expect(self, *chars: str) -> Steps[str]:
        """Take one of these characters.

        Raises:
            UnreadableError: another one comes, or none.
        """
        char = yield from self.peek()
        if char not in chars:
            raise UnreadableError(f"expected {' or '.join(chars)}, found {char!r}" if char else "it is cut off")
        return (yield from self.take())

    def string(self, pass_on: Callable[[str], None]) -> Steps[None]:
        """Take a JSON string with its quotes.

        Raises:
            UnreadableError: it is none, or has no end.
        """
        pass_on((yield from self.expect('"')))
        while True:
            char = yield from self.take()
            if not char:
                raise UnreadableError("it is cut off")
            if char < " ":
                raise UnreadableError(f"a text of its JSON holds {char!r}")
            pass_on(char)
            if char == '"':
                return
            if char == "\\":
                pass_on((yield from self.take()))

    def value(self, pass_on: Callable[[str], None]) -> Steps[None]:
        """Take what is a JSON value by its brackets and quotes; whether it is one in full is for ``json`` to say.

        Raises:
            UnreadableError: it is none, or has no end.
        """
        closing: list[str] = []
        while True:
            char = yield from self.peek()
            if char == '"':
                yield from self.string(pass_on)
            elif char in _SCALAR:
                while (yield from self.peek()) in _SCALAR:
                    pass_on((yield from self.take()))
            else:
                if char in _CLOSING:
                    closing.append(_CLOSING[char])
                    if len(closing) > _DEPTH:
                        raise UnreadableError(f"its JSON is nested deeper than {_DEPTH} levels")
                elif closing and char == closing[-1]:
                    closing.pop()
                elif not closing or char not in (*_SPACE, ",", ":"):
                    raise UnreadableError(f"{char!r} stands where JSON cannot have it" if char else "it is cut off")
                pass_on((yield from self.take()))
            if not closing:
                return

    def _more(self) -> Steps[None]:
        if not self._ended:
            char = yield
            self._ahead += char
            self._ended = not char
