"""What each error of the SDK becomes over HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lora_hub_sdk import errors
from lora_hub_sdk.server.faults import refusal_of
from lora_hub_sdk.server.refusals import Refusal

FOLDER = "/srv/models/secret-place"
#: What each status may be called; clients choose their exception by it.
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def tree(kind: type[errors.LoraHubError] = errors.LoraHubError) -> Iterator[type[errors.LoraHubError]]:
    yield kind
    for below in kind.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from tree(below)


def made(kind: type[errors.LoraHubError]) -> errors.LoraHubError:
    """One of that type that says a path, whatever its constructor wants."""
    text = f"the folder '{FOLDER}/x' and {FOLDER}/y could not be read"
    if issubclass(kind, errors.SourceError):
        return kind(text, repo_id=FOLDER)
    try:
        error = kind(text)
    except TypeError:  # one that is made of facts instead of a text
        error = kind.__new__(kind, text)
    error.__dict__.update(name="x", similar=(), retry_after_s=7)
    return error


@pytest.mark.parametrize("kind", sorted(set(tree()), key=str), ids=str)
def test_every_error_has_a_status_and_tells_no_path(kind: type[errors.LoraHubError]) -> None:
    refusal = refusal_of(made(kind))
    assert 400 <= refusal.status < 600
    assert "srv" not in refusal.message
    assert "secret-place" not in refusal.message
    assert refusal.kind == KINDS.get(
        refusal.status, "server_error" if refusal.status >= 500 else "invalid_request_error"
    )
    assert kind is errors.LoraHubError or refusal.code != "internal_error", "it was never decided what this one becomes"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.ConfigurationError("k=0"), 400),
        (errors.AdapterNotFoundError("x", namespace="n"), 404),
        (errors.RetiredError("x"), 409),
        (errors.EmptyPromptError(0), 400),
        (errors.PromptTooLongError(0, 9, 5, hint="cut it"), 400),
        (errors.TooManyRequestsError("too many", retry_after_s=7), 429),
        (errors.UnauthorizedError("no key"), 401),
        (errors.MissingRightError("register", ["read"]), 403),
        (errors.EngineBusyError("busy"), 503),
        (errors.DeadlineExceededError("late"), 504),
        (errors.EngineMemoryError("large"), 413),
        (errors.StorageError(FOLDER), 503),
    ],
    ids=lambda value: type(value).__name__,
)
def test_statuses_are_those_that_clients_expect(error: errors.LoraHubError, status: int) -> None:
    assert refusal_of(error).status == status


def test_who_has_to_wait_is_told_how_long() -> None:
    for error, seconds in (
        (errors.TooManyRequestsError("x", retry_after_s=7), "7"),
        (errors.EngineBusyError("x"), "1"),
    ):
        assert refusal_of(error).response.headers["retry-after"] == seconds
    assert Refusal(429, "x", retry_after_s=0.2).response.headers["retry-after"] == "1"


def test_an_unknown_name_tells_alike_ones_and_no_namespace() -> None:
    refusal = refusal_of(errors.AdapterNotFoundError("mats", namespace="team-a", similar=["maths"]))
    assert (refusal.code, refusal.param) == ("model_not_found", "model")
    assert "'maths'" in refusal.message
    assert "team-a" not in refusal.message
