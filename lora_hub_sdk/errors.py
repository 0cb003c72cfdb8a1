"""Every error that the SDK raises on purpose, in one tree.

A message says what was asked, what was found, and what to do. Facts that a program may want are attributes.
Where people already catch a standard type (``ValueError``, ``LookupError``), the error is also of that type.

    LoraHubError
    ├── ConfigurationError (ValueError)        an argument that cannot be used
    │   └── UnknownStrategyError
    ├── MissingExtraError (ImportError)        an optional package is not installed
    ├── ModelNotFoundError (LookupError)       a base model or an encoder that no source has
    │   └── ModelDamagedError                  found, but not what its checksum promised
    ├── SourceError                            a repository that could not be pulled
    │   ├── RepoNotFoundError (LookupError)
    │   ├── RepoAccessError (PermissionError)  private or gated, or the token is missing or wrong
    │   ├── RepoHiddenError                    either of the two above: the Hub does not tell
    │   ├── RevisionNotFoundError (LookupError)
    │   └── DownloadError (OSError)            the Hub is unreachable, answered 5xx, or broke off
    ├── AdmissionError (ValueError)            files that are no adapter we can serve exactly
    │   ├── MissingConfigError
    │   ├── InvalidConfigError
    │   ├── MissingWeightsError
    │   ├── UnsafeWeightsError                 pickle only
    │   ├── DamagedWeightsError                not a readable safetensors file
    │   ├── UnsupportedFeatureError
    │   ├── BaseModelMismatchError
    │   ├── UnmatchedTensorsError
    │   ├── ShapeMismatchError
    │   ├── NonFiniteWeightsError
    │   ├── OutOfBoundsError                   a norm, scale or size beyond the limits
    │   ├── NoEffectError                      weights that change nothing
    │   └── SamplesError                       no text to represent the adapter by
    ├── RegistryError
    │   ├── AdapterNotFoundError (LookupError)
    │   ├── NameTakenError
    │   ├── RetiredError                       an adapter that was taken out of service
    │   ├── PinnedError                        an adapter that is held at its revision
    │   ├── ConflictError                      somebody else changed it meanwhile
    │   ├── NoAdaptersError (LookupError)      nothing to retrieve from
    │   ├── AdapterChangedError                files differ from what was registered
    │   ├── EncoderMismatchError               vectors of another encoder
    │   ├── IndexUnavailableError (ConnectionError)  the server of the vector index does not answer
    │   ├── IndexDamagedError                  a vector index that cannot be read any more
    │   ├── StorageError (OSError)             the database does not answer, is locked, or is full
    │   ├── SchemaError                        a database older or newer than this package
    │   └── KeyNotFoundError (LookupError)     no API key of that name
    ├── AccessError                            what a server refuses to a caller
    │   ├── UnauthorizedError (PermissionError)  no key, or one that is not valid
    │   ├── MissingRightError (PermissionError)  a key that may not do this
    │   └── TooManyRequestsError               more than the caller's share
    └── GenerationError
        ├── EmptyPromptError (ValueError)
        ├── PromptTooLongError (ValueError)
        ├── UnsupportedRouteError (ValueError) adapters that cannot be combined as asked
        ├── UnusableAnswerError (ValueError)   no call of a tool, or no object, where one was asked for
        ├── EngineClosedError (RuntimeError)
        ├── EngineBusyError                    too many requests wait already
        ├── DeadlineExceededError (TimeoutError)
        ├── RequestCancelledError
        ├── EngineMemoryError (MemoryError)    one request alone is too large
        └── EngineCrashedError (RuntimeError)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class LoraHubError(Exception):
    """Root of every error raised on purpose by this package."""


# -- arguments and optional parts ------------------------------------------------------------------------------


class ConfigurationError(LoraHubError, ValueError):
    """An argument that cannot be used."""


class UnknownStrategyError(ConfigurationError):
    """A strategy name that is not in the table."""

    def __init__(self, name: object, known: Sequence[str]) -> None:
        super().__init__(f"strategy {name!r} is unknown; known strategies are {', '.join(known)}")
        self.name = name
        self.known = tuple(known)


class MissingExtraError(LoraHubError, ImportError):
    """A name was used whose optional packages are not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs optional packages; run: pip install 'lora-hub-sdk[{extra}]'")
        self.extra = extra


class ModelNotFoundError(LoraHubError, LookupError):
    """A base model or an encoder that neither a path, the Hub, nor an installed wheel offers."""

    def __init__(self, name: str, tried: Iterable[str]) -> None:
        self.name = name
        self.tried = tuple(tried)
        super().__init__(f"model {name!r} was not found; tried: {'; '.join(self.tried)}")


class ModelDamagedError(ModelNotFoundError):
    """Model files that were found but do not have the expected sha256, or are incomplete."""


# -- pulling -------------------------------------------------------------------------------------------------


class SourceError(LoraHubError):
    """A repository that could not be pulled."""

    def __init__(self, message: str, *, repo_id: str, revision: str | None = None) -> None:
        super().__init__(message)
        self.repo_id = repo_id
        self.revision = revision


class RepoNotFoundError(SourceError, LookupError):
    """Neither a local folder nor a repository of that name."""


class RepoAccessError(SourceError, PermissionError):
    """The repository is private or gated and the token at hand does not open it."""


class RepoHiddenError(RepoNotFoundError, RepoAccessError):
    """No such repository, or a private one: without a valid token the Hub does not tell these apart."""


class RevisionNotFoundError(SourceError, LookupError):
    """The repository exists, the revision does not."""


class DownloadError(SourceError, OSError):
    """The Hub could not be reached, answered with an error, or broke off in the middle."""


# -- admission -----------------------------------------------------------------------------------------------


class AdmissionError(LoraHubError, ValueError):
    """Files that are no adapter we can serve exactly; nothing was registered."""

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(f"adapter {source!r} was refused: {problem}")
        self.source = source
        self.problem = problem


class MissingConfigError(AdmissionError):
    """There is no adapter_config.json."""


class InvalidConfigError(AdmissionError):
    """adapter_config.json is not readable, or a field has a value that makes no sense."""


class MissingWeightsError(AdmissionError):
    """There is no adapter_model.safetensors."""


class UnsafeWeightsError(MissingWeightsError):
    """The only weights are a pickle, which can execute code when it is read."""


class DamagedWeightsError(AdmissionError):
    """adapter_model.safetensors cannot be parsed."""


class UnsupportedFeatureError(AdmissionError):
    """A PEFT feature that this version cannot serve exactly."""

    def __init__(self, source: str, feature: str, found: object) -> None:
        super().__init__(source, f"{feature}={found!r} is not supported yet, and dropping it would change its answers")
        self.feature = feature


class BaseModelMismatchError(AdmissionError):
    """The adapter was trained for another base model than the one asked for."""


class UnmatchedTensorsError(AdmissionError):
    """Tensors that belong to no module of the base model, or lack their other half."""

    def __init__(self, source: str, keys: Sequence[str], why: str) -> None:
        shown = ", ".join(keys[:5]) + (f", and {len(keys) - 5} more" if len(keys) > 5 else "")
        super().__init__(source, f"{why}: {shown}")
        self.keys = tuple(keys)


class ShapeMismatchError(AdmissionError):
    """A tensor whose shape contradicts the configured rank or the base model."""


class NonFiniteWeightsError(AdmissionError):
    """Weights that hold NaN or infinity."""


class OutOfBoundsError(AdmissionError):
    """A size, scale or norm that no honest adapter has; ``limit`` is the bound that it passes."""

    def __init__(self, source: str, what: str, found: float, limit: float) -> None:
        super().__init__(
            source, f"{what} is {found:.10g}, the limit is {limit:.10g}; raise it in Limits where you trust it"
        )
        self.what = what
        self.found = found
        self.limit = limit


class NoEffectError(AdmissionError):
    """Every delta is zero, so the base model's answers would pass for the adapter's."""


class SamplesError(AdmissionError):
    """There is no usable text, or no usable vector, to represent the adapter by."""


# -- registry --------------------------------------------------------------------------------------------------


class RegistryError(LoraHubError):
    """The registry cannot do what was asked."""


class AdapterNotFoundError(RegistryError, LookupError):
    """No adapter of that name is registered."""

    def __init__(self, name: str, *, namespace: str, similar: Sequence[str] = ()) -> None:
        hint = f"; did you mean {', '.join(map(repr, similar))}?" if similar else "; `lora-hub list` shows them all"
        super().__init__(f"no adapter {name!r} is registered in namespace {namespace!r}{hint}")
        self.name = name
        self.similar = tuple(similar)


class NameTakenError(RegistryError):
    """The name already belongs to an adapter with other content, or to another API key."""


class RetiredError(RegistryError):
    """The adapter was taken out of service; ``hub.restore`` brings it back."""


class PinnedError(RegistryError):
    """The adapter is held at its revision; ``hub.unpin`` lets it move again."""


class ConflictError(RegistryError):
    """Somebody else changed the adapter between reading and writing; nothing was written."""


class NoAdaptersError(RegistryError, LookupError):
    """A prompt has no adapter to be routed to, so only the base model could have answered."""


class AdapterChangedError(RegistryError):
    """The files on disk are not the ones that were registered."""


class EncoderMismatchError(RegistryError):
    """Vectors of one encoder cannot be searched with another."""


class IndexUnavailableError(RegistryError, ConnectionError):
    """The server of the vector index does not answer; nothing is lost, SQL holds every vector."""


class IndexDamagedError(RegistryError):
    """The files of the vector index cannot be read any more; it is rebuilt from SQL."""


class StorageError(RegistryError, OSError):
    """The database cannot be reached, stays locked, or is full; nothing was written."""


class SchemaError(RegistryError):
    """The database was written by an older or newer version of this package."""


class KeyNotFoundError(RegistryError, LookupError):
    """No API key of that name was ever made."""


# -- a server's callers ------------------------------------------------------------------------------------------


class AccessError(LoraHubError):
    """A server refuses a request because of who asks; nothing was started."""


class UnauthorizedError(AccessError, PermissionError):
    """No API key came with the request, or one that is unknown, revoked or expired."""


class MissingRightError(AccessError, PermissionError):
    """The API key is valid, but was not given the right to do this."""

    def __init__(self, right: str, has: Iterable[str]) -> None:
        self.right = right
        self.has = tuple(sorted(has))
        super().__init__(
            f"this needs the right {right!r}, the API key has {', '.join(self.has) or 'none'}; ask the server's owner "
            f"for a key made with --right {right}"
        )


class TooManyRequestsError(AccessError):
    """The caller asks more than its share; ``retry_after_s`` whole seconds later there is room again."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(f"{message}; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


# -- generation --------------------------------------------------------------------------------------------------


class GenerationError(LoraHubError):
    """Text could not be generated."""


class EmptyPromptError(GenerationError, ValueError):
    """A prompt without any text cannot be routed."""

    def __init__(self, row: int) -> None:
        super().__init__(f"prompt {row} of the batch is empty; give it some text or leave it out")
        self.row = row


class PromptTooLongError(GenerationError, ValueError):
    """The prompt does not fit into the context and cutting it was not allowed, or could not help."""

    def __init__(self, row: int, tokens: int, limit: int, *, hint: str) -> None:
        super().__init__(
            f"prompt {row} of the batch has {tokens} tokens, room is for {limit} beside the answer; {hint}"
        )
        self.row = row
        self.tokens = tokens
        self.limit = limit


class UnsupportedRouteError(GenerationError, ValueError):
    """The route's adapters cannot be combined in the way that was asked; each of them can be served otherwise."""


class UnusableAnswerError(GenerationError, ValueError):
    """The answer is complete, or was cut off, and is not the call or the object that was asked for."""


class EngineClosedError(GenerationError, RuntimeError):
    """The engine or the hub was closed before the call."""


class EngineBusyError(GenerationError):
    """More requests wait than the engine takes; nothing was started."""


class DeadlineExceededError(GenerationError, TimeoutError):
    """The answer was not complete within the time that its request gave."""


class RequestCancelledError(GenerationError):
    """The request was cancelled before its answer was complete."""


class EngineMemoryError(GenerationError, MemoryError):
    """A request does not fit into memory, even by itself."""


class EngineCrashedError(GenerationError, RuntimeError):
    """The thread that owns the model died; ``__cause__`` tells of what. Open the engine again."""
