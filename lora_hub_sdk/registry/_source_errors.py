"""What the Hub's client raises, in our own words.

Imported only once a pull has begun, because it imports huggingface_hub. That client is built on httpx in
its 1.x and on httpx2 in its 2.x releases, so nothing here names either library.
"""

from __future__ import annotations

import re
from typing import Final

from huggingface_hub import errors as hf

from lora_hub_sdk.errors import (
    DownloadError,
    RepoAccessError,
    RepoHiddenError,
    RepoNotFoundError,
    RevisionNotFoundError,
    SourceError,
)

#: Root of every error of the HTTP library underneath, whichever it is.
_HTTP_ERROR: Final = hf.HfHubHTTPError.__mro__[1]
_PASSING_STATUS: Final = frozenset({408, 429})
_SECRETS: Final = (
    (re.compile(r"hf_\w{4,}|(?i:bearer)\s+[^\s'\"]+"), "***"),
    (re.compile(r"(?<=://)[^/@\s]+@"), ""),
    # A redirect to a CDN carries its signature in the query.
    (re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\"]*"), r"\1"),
)


def is_outage(error: Exception) -> bool:
    """Whether the same request may soon succeed: overload, a server error, a broken connection."""
    status = _status(error)
    if status is not None:
        return status in _PASSING_STATUS or status >= 500
    return isinstance(error, _HTTP_ERROR)


def wait_asked(error: Exception) -> float:
    """Seconds that an overloaded Hub asks to be left alone; 0 where it names none."""
    if not isinstance(error, hf.HfHubHTTPError):
        return 0.0
    headers = error.response.headers
    # The draft standard that huggingface.co follows: nothing remaining, and the seconds until there is again.
    limit = re.search(r";\s*r=0\s*;\s*t=(\d{1,9})", headers.get("RateLimit", ""))
    asked = limit[1] if limit else headers.get("Retry-After", "")
    return float(asked) if re.fullmatch(r"\d{1,9}", asked) else 0.0


def is_unreachable(error: Exception) -> bool:
    """Whether the Hub had no say, so that the last answer it gave still stands."""
    return is_outage(error) or isinstance(error, hf.OfflineModeIsEnabled)


def is_unretried_outage(error: Exception) -> bool:
    """Whether a download broke in one of the few ways that huggingface_hub does not retry by itself."""
    return (_status(error) or 0) >= 500 or type(error).__name__ == "ReadError"


def translate(
    error: Exception, *, repo_id: str, revision: str | None, token: str | None, done: str = "downloaded"
) -> SourceError:
    """Our error for any that escaped from a pull; its text never holds ``token`` or another credential."""
    kind, text = _told(_root(error), f"{repo_id!r}" + (f" at revision {revision!r}" if revision else ""), done)
    if token:
        text = text.replace(token, "***")
    return kind(text, repo_id=repo_id, revision=revision)


def _told(error: Exception, asked: str, done: str) -> tuple[type[SourceError], str]:
    status = _status(error)
    if isinstance(error, hf.RevisionNotFoundError):
        return RevisionNotFoundError, f"{asked} was not found: the repository has no such revision; check it"
    if isinstance(error, (hf.HFValidationError, hf.HfUriError)):
        return RepoNotFoundError, f"{asked} is neither a folder nor a repository id: {_first_line(error)}"
    if isinstance(error, (hf.GatedRepoError, hf.DisabledRepoError)) or status == 403:
        return RepoAccessError, (
            f"{asked} is gated or disabled, and the token at hand does not open it (HTTP {status}); "
            "ask for access on its page, then pass token= or run `hf auth login`"
        )
    if isinstance(error, hf.RepositoryNotFoundError) and status == 401:
        return RepoHiddenError, (
            f"{asked} does not exist on the Hub, or is private and needs a token; "
            "check the name, then pass token= or run `hf auth login`"
        )
    if status == 401:
        return RepoAccessError, (
            f"{asked} was refused, because the Hub does not accept the token at hand (HTTP 401); "
            "pass a valid token= or run `hf auth login`"
        )
    if isinstance(error, hf.RepositoryNotFoundError) or (status == 404 and not _is_missing_file(error)):
        return RepoNotFoundError, f"{asked} is neither a folder nor a repository on the Hub; check the name"
    return DownloadError, f"{asked} could not be {done}: {_first_line(error)}; {_advice(error)}"


def _root(error: Exception) -> Exception:
    """The Hub's own answer behind the client's "not in the cache either", where there is one."""
    cause: BaseException | None = error
    while isinstance(cause, hf.LocalEntryNotFoundError):
        cause = cause.__cause__
    return cause if isinstance(cause, Exception) else error


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, hf.HfHubHTTPError) else None


def _is_missing_file(error: Exception) -> bool:
    return isinstance(error, hf.EntryNotFoundError)


def _advice(error: Exception) -> str:
    if isinstance(error, hf.OfflineModeIsEnabled):
        return "unset HF_HUB_OFFLINE, or pull it once while online"
    if is_outage(error):
        return "check the connection and the Hub's state, then try again"
    if isinstance(error, OSError) and error.errno is not None:
        return "check the space and the permissions of the cache folder"
    return "try again; if it stays, check the endpoint and the repository's files"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text
