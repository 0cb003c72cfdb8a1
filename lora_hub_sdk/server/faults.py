"""Which refusal each error of the tree becomes.

Only errors about what the client sent are told in their own words; those of the server's own affairs name folders,
databases and repositories, and are told in general ones. The log has all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lora_hub_sdk import errors
from lora_hub_sdk.faces.adapter_facts import error_text
from lora_hub_sdk.server.refusals import Refusal

_BAD: Final = "invalid_request_error"
_OURS: Final = "server_error"
#: What a busy server comes to by itself; the metrics count it, and no log has to be full of it.
EXPECTED: Final = (
    errors.EngineBusyError,
    errors.DeadlineExceededError,
    errors.EngineClosedError,
    errors.RequestCancelledError,
)


@dataclass(frozen=True, slots=True)
class _Told:
    """``words`` None: the error's own."""

    status: int
    kind: str
    code: str | None = None
    words: str | None = None
    retry_after_s: float | None = None


_TOLD: Final[dict[type[errors.LoraHubError], _Told]] = {
    errors.LoraHubError: _Told(500, _OURS, "internal_error", "the server could not answer; its log tells why"),
    errors.ConfigurationError: _Told(400, _BAD),
    errors.UnknownStrategyError: _Told(400, _BAD, "unknown_strategy"),
    errors.MissingExtraError: _Told(501, _OURS, "not_installed", "this server was installed without what that needs"),
    errors.ModelNotFoundError: _Told(
        503, _OURS, "base_model_unavailable", "the server does not have the base model that this needs"
    ),
    errors.ModelDamagedError: _Told(
        503, _OURS, "base_model_unavailable", "the files of the base model that this needs are damaged"
    ),
    # Repositories: told apart no further than the Hub tells anybody.
    errors.SourceError: _Told(400, _BAD, "repository_unusable", "the repository cannot be pulled"),
    errors.RepoNotFoundError: _Told(400, _BAD, "repository_not_found", "there is no such repository for this server"),
    errors.RepoAccessError: _Told(400, _BAD, "repository_not_found", "there is no such repository for this server"),
    errors.RepoHiddenError: _Told(400, _BAD, "repository_not_found", "there is no such repository for this server"),
    errors.RevisionNotFoundError: _Told(400, _BAD, "revision_not_found", "the repository has no such revision"),
    errors.DownloadError: _Told(
        502, _OURS, "hub_unavailable", "the Hub could not be reached, or broke off; try again later", 10
    ),
    errors.AdmissionError: _Told(400, _BAD, "adapter_refused"),
    # The registry.
    errors.RegistryError: _Told(
        500, _OURS, "registry_error", "the registry could not answer; the server's log tells why"
    ),
    errors.AdapterNotFoundError: _Told(404, _BAD, "model_not_found"),
    errors.NameTakenError: _Told(409, _BAD, "name_taken"),
    errors.RetiredError: _Told(409, _BAD, "adapter_retired", "the adapter was taken out of service"),
    errors.PinnedError: _Told(409, _BAD, "adapter_pinned", "the adapter is held at its revision"),
    errors.ConflictError: _Told(409, _BAD, "conflict", "somebody else changed the adapter meanwhile; ask again"),
    errors.NoAdaptersError: _Told(
        404,
        _BAD,
        "no_adapters",
        "no adapter is left to answer with: none is registered, or tags and exclude leave none; ask for model "
        "'base' to have the base model answer",
    ),
    errors.AdapterChangedError: _Told(
        503, _OURS, "adapter_unavailable", "the adapter's files are not those that were registered"
    ),
    errors.EncoderMismatchError: _Told(
        503, _OURS, "encoder_unavailable", "the registry cannot be searched with this server's encoder"
    ),
    errors.IndexUnavailableError: _Told(
        503, _OURS, "index_unavailable", "the vector index does not answer; try again later", 5
    ),
    errors.IndexDamagedError: _Told(503, _OURS, "index_unavailable", "the vector index has to be made anew"),
    errors.StorageError: _Told(503, _OURS, "storage_unavailable", "the database does not answer; try again later", 5),
    errors.SchemaError: _Told(503, _OURS, "storage_unavailable", "the database is of another version than the server"),
    errors.KeyNotFoundError: _Told(404, _BAD, "key_not_found"),
    # Who asks.
    errors.AccessError: _Told(403, "permission_error", "forbidden"),
    errors.UnauthorizedError: _Told(401, "authentication_error", "invalid_api_key"),
    errors.MissingRightError: _Told(403, "permission_error", "missing_right"),
    errors.TooManyRequestsError: _Told(429, "rate_limit_error", "rate_limit_exceeded"),
    # Answers.
    errors.GenerationError: _Told(500, _OURS, "generation_failed", "no answer could be generated"),
    errors.EmptyPromptError: _Told(400, _BAD, "empty_prompt"),
    errors.PromptTooLongError: _Told(400, _BAD, "context_length_exceeded"),
    errors.UnsupportedRouteError: _Told(400, _BAD, "unsupported_route"),
    errors.EngineClosedError: _Told(503, _OURS, "closing", "the server is closing; try again later", 5),
    errors.EngineBusyError: _Told(503, _OURS, "busy", "too many requests wait already; try again later", 1),
    errors.DeadlineExceededError: _Told(504, _OURS, "timeout", "the answer was not complete in time; ask for less"),
    errors.RequestCancelledError: _Told(
        503, _OURS, "cancelled", "the request was given up before its answer was complete"
    ),
    errors.EngineMemoryError: _Told(
        413, _BAD, "too_large", "the request does not fit into the server's memory; ask for less"
    ),
    errors.EngineCrashedError: _Told(503, _OURS, "engine_crashed", "the engine stopped; the server's log tells why", 5),
}


def refusal_of(error: errors.LoraHubError) -> Refusal:
    """What a client is told of an error."""
    told = next(_TOLD[kind] for kind in type(error).__mro__ if kind in _TOLD)
    words, param = told.words, None
    if isinstance(error, errors.AdapterNotFoundError):
        words, param = _not_found(error), "model"
    return Refusal(
        told.status,
        error_text(error) if words is None else words,
        kind=told.kind,
        code=told.code,
        param=param,
        retry_after_s=getattr(error, "retry_after_s", told.retry_after_s),
    )


def _not_found(error: errors.AdapterNotFoundError) -> str:
    # Alike are only names of the same namespace.
    alike = f"; did you mean {', '.join(map(repr, error.similar))}?" if error.similar else ""
    return f"there is no model or adapter {error.name[:200]!r}{alike or '; GET /v1/models lists what there is'}"
