"""The Hub's HTTP protocol, as far as huggingface_hub, transformers and peft speak it to models and datasets.

The real Hub is the reference: status codes, headers and JSON fields are the ones it sends.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, ClassVar, Final
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from lora_hub_sdk.testing._hub_store import Commit, Repo, StoredFile

if TYPE_CHECKING:
    from lora_hub_sdk.testing.local_hub import LocalHub

_REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
_KIND = "(?P<kind>models|datasets)"
_ROUTES: Final = (
    ("list_repos", re.compile(rf"/api/{_KIND}/?")),
    ("repo_info", re.compile(rf"/api/{_KIND}/{_REPO}/revision/(?P<revision>[^/]+)")),
    ("tree", re.compile(rf"/api/{_KIND}/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?")),
    ("paths_info", re.compile(rf"/api/{_KIND}/{_REPO}/paths-info/(?P<revision>[^/]+)")),
    ("preupload", re.compile(rf"/api/{_KIND}/{_REPO}/preupload/(?P<revision>[^/]+)")),
    ("commit", re.compile(rf"/api/{_KIND}/{_REPO}/commit/(?P<revision>[^/]+)")),
    ("create_repo", re.compile("/api/repos/create")),
    ("validate_yaml", re.compile("/api/validate-yaml")),
    ("repo_info", re.compile(rf"/api/{_KIND}/{_REPO}")),
    # Before the models, among which "datasets" would be an owner.
    ("resolve", re.compile(rf"/(?P<kind>datasets)/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")),
    ("resolve", re.compile(rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")),
)
#: What a listing is sorted by, always from the largest.
_SORTS: Final = ("downloads", "likes", "lastModified", "createdAt", "trendingScore")
#: What a listing tells of a repository unless it is asked for more.
_LISTED: Final = (
    "_id", "id", "modelId", "likes", "private", "downloads", "tags", "pipeline_tag", "library_name", "createdAt",
)  # fmt: skip
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_CHUNK = 1 << 16


class HubError(Exception):
    """An answer other than 2xx, with the X-Error-Code by which the client tells one 4xx from another."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.headers["X-Error-Message"] = message
        if code is not None:
            self.headers["X-Error-Code"] = code


class Server(ThreadingHTTPServer):
    """Answers many clients at once and keeps quiet about those that hang up."""

    # The default of 5 makes a burst of downloads wait a second for its next try to connect.
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection; ``hub`` is set on the subclass that a LocalHub serves with."""

    hub: ClassVar[LocalHub]
    protocol_version = "HTTP/1.1"
    server_version = "LocalHub"
    # Headers and body are two writes; Nagle would hold back the second for 40 ms.
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Stay silent: ``LocalHub.requests`` is the log."""

    def _do(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self._body = self.rfile.read(length).decode() if length else ""
        self._target = urlsplit(self.path)
        self._query = parse_qs(self._target.query)
        self.hub.record(self.command, self._target.path)
        self.hub.pause()
        try:
            self._dispatch()
        except HubError as error:
            self._send_json({"error": str(error)}, error.status, error.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = _do  # noqa: N815 (http.server finds them by these names)

    # -- routes ----------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        for name, pattern in _ROUTES:
            match = pattern.fullmatch(self._target.path)
            if match:
                # Unquoted only after the split, because a branch may hold a slash.
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                getattr(self, f"_{name}")(**parts)
                return
        raise HubError(404, "Sorry, we can't find the page you are looking for.")

    def _list_repos(self, kind: str) -> None:
        self.hub.meet_faults()
        search = [text.lower() for text in self._query.get("search", [])]
        author, sort = self._option("author"), self._option("sort")
        wanted = set(self._query.get("filter", []))
        found = [
            _info(repo, commit)
            for repo in self.hub.repos(kind)
            if (commit := repo.find("main")) is not None
            and (not repo.private or self._is_authorized())
            and all(text in repo.id.lower() for text in search)
            and (author is None or repo.id.partition("/")[0] == author)
            and wanted <= set(commit.tags())
        ]
        if sort is not None:
            if sort not in _SORTS:
                raise HubError(400, f'"sort" must be one of {", ".join(_SORTS)}')
            found.sort(key=lambda info: info[sort], reverse=True)
        start = int(self._option("cursor") or 0)
        stop = start + min(int(self._option("limit") or self.hub.page_size), self.hub.page_size)
        link = {} if stop >= len(found) else {"Link": f'<{self._next_page(stop)}>; rel="next"'}
        self._send_json([self._told(info) for info in found[start:stop]], headers=link)

    def _told(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a listed repository that were asked for."""
        asked = {"_id", "id", *self._query["expand"]} if "expand" in self._query else set(_LISTED)
        if self._flag("full"):
            asked |= info.keys() - {"cardData"}
        if self._flag("cardData"):
            asked.add("cardData")
        return {key: value for key, value in info.items() if key in asked}

    def _next_page(self, start: int) -> str:
        # The real Hub's cursor is opaque, and its link repeats the rest of the question.
        query = urlencode({**self._query, "cursor": [str(start)]}, doseq=True)
        return f"{self.hub.url}{self._target.path}?{query}"

    def _repo_info(self, kind: str, repo: str, revision: str = "main") -> None:
        found, commit = self._open(repo, revision, kind)
        info = _info(found, commit, sizes=self._flag("blobs"))
        asked = {"_id", "id", *self._query.get("expand", info)}
        self._send_json({key: value for key, value in info.items() if key in asked})

    def _tree(self, kind: str, repo: str, revision: str, path: str = "") -> None:
        _, commit = self._open(repo, revision, kind)
        below = f"{path.strip('/')}/" if path.strip("/") else ""
        entries = _tree_entries(commit.files, below, recursive=self._flag("recursive"))
        if not entries and below:
            raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.sha)
        self._send_json(entries)

    def _paths_info(self, kind: str, repo: str, revision: str) -> None:
        _, commit = self._open(repo, revision, kind)
        asked = set(parse_qs(self._body).get("paths", []))
        everything = _tree_entries(commit.files, "", recursive=True)
        self._send_json([entry for entry in everything if entry["path"] in asked])

    def _resolve(self, repo: str, revision: str, path: str, kind: str = "models") -> None:
        found, commit = self._open(repo, revision, kind, path)
        if found.gated and not self._is_authorized():
            status = 403 if "Authorization" in self.headers else 401
            raise HubError(status, f"Access to this {kind[:-1]} is restricted. Ask for access.", "GatedRepo")
        # A look-up in the commit's own names: no request ever becomes a path on this disk.
        file = commit.files.get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.sha)
        keep = self.hub.truncation(repo, kind, path) if self.command == "GET" else None
        self._send_file(file, commit.sha, keep)

    # -- uploads ---------------------------------------------------------------------------------------------

    def _create_repo(self) -> None:
        self._require_right()
        asked = json.loads(self._body)
        repo_id = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
        kind = f"{asked.get('type', 'model')}s"
        self.hub.meet_faults(repo_id, kind)
        url = f"{self.hub.url}/{repo_id if kind == 'models' else f'{kind}/{repo_id}'}"
        if not self.hub.create(repo_id, kind, private=asked.get("visibility") == "private"):
            self._send_json({"error": f"You already created this {kind[:-1]} repo", "url": url}, 409)
            return
        self._send_json({"url": url, "name": repo_id})

    def _validate_yaml(self) -> None:
        self._send_json({"errors": [], "warnings": []})

    def _preupload(self, kind: str, repo: str, revision: str) -> None:
        """Every file is wanted within the commit, however large, so that there is no server of LFS or Xet files."""
        self._require_right()
        _, commit = self._open(repo, revision, kind)
        asked = [file["path"] for file in json.loads(self._body)["files"]]
        self._send_json(
            {
                "files": [
                    {"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": _git_oid(commit, path)}
                    for path in asked
                ]
            }
        )

    def _commit(self, kind: str, repo: str, revision: str) -> None:
        self._require_right()
        found, commit = self._open(repo, revision, kind)
        if revision not in found.branches:
            raise HubError(404, "Invalid rev id", "RevisionNotFound")
        changes: dict[str, bytes | None] = {}
        for operation in map(json.loads, self._body.strip().split("\n")):
            told = operation["value"]
            match operation["key"]:
                case "header":
                    if told.get("parentCommit", commit.sha) != commit.sha:
                        raise HubError(412, "A commit has happened since. Please refresh and try again.")
                case "file":
                    changes[told["path"]] = base64.b64decode(told["content"])
                case "deletedFile" | "deletedFolder":
                    below = told["path"].rstrip("/") + "/"
                    gone = [path for path in commit.files if path == told["path"] or path.startswith(below)]
                    if not gone:
                        raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                    changes |= dict.fromkeys(gone)
                case other:
                    raise HubError(400, f"This Hub takes no {other}")
        sha = self.hub.change(found, revision, changes)
        self._send_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def _require_right(self) -> None:
        if not self._is_authorized():
            given = "Authorization" in self.headers
            raise HubError(
                401, "Invalid credentials in Authorization header" if given else "Invalid username or password."
            )

    def _open(self, repo_id: str, revision: str, kind: str, path: str | None = None) -> tuple[Repo, Commit]:
        self.hub.meet_faults(repo_id, kind, path)
        repo = self.hub.repo(repo_id, kind)
        if repo is not None and repo.private and not self._is_authorized():
            # The real Hub does not give away whether a private repository exists.
            if "Authorization" in self.headers:
                raise HubError(401, "Invalid credentials in Authorization header")
            raise HubError(401, "Repository not found", "RepoNotFound")
        if repo is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        commit = repo.find(revision)
        if commit is None:
            raise HubError(404, "Invalid rev id", "RevisionNotFound")
        return repo, commit

    # -- requests and answers --------------------------------------------------------------------------------

    def _is_authorized(self) -> bool:
        return self.hub.token is not None and self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _option(self, name: str) -> str | None:
        return self._query.get(name, [None])[0]

    def _flag(self, name: str) -> bool:
        return (self._option(name) or "").lower() in {"true", "1"}

    def _send_json(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._send_head(status, {"Content-Type": "application/json", **(headers or {})}, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_head(self, status: int, headers: Mapping[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send_file(self, file: StoredFile, sha: str, keep: int | None) -> None:
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        wanted = _parse_range(self.headers.get("Range"), file.size)
        start, stop = wanted or (0, file.size)
        if wanted is not None:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
        self._send_head(206 if wanted else 200, headers, stop - start)
        if self.command != "HEAD":
            self._send_content(file, start, stop if keep is None else min(stop, keep))
            # Fewer bytes than promised: only the end of the connection ends this answer.
            self.close_connection = self.close_connection or keep is not None

    def _send_content(self, file: StoredFile, start: int, stop: int) -> None:
        with file.content.open("rb") as source:
            source.seek(start)
            while start < stop:
                chunk = source.read(min(_CHUNK, stop - start))
                self.wfile.write(chunk)
                start += len(chunk)


def _parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Start and stop (exclusive) of a single byte range; None where the whole file is to be sent."""
    match = _RANGE.fullmatch(header or "")
    if match is None or not any(match.groups()):
        return None
    first, last = match.groups()
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= stop:
        raise HubError(416, "Range Not Satisfiable", Content_Range=f"bytes */{size}")
    return start, stop


def _info(repo: Repo, commit: Commit, *, sizes: bool = False) -> dict[str, Any]:
    first = min(known.created_at for known in repo.commits.values())
    info: dict[str, Any] = {
        "_id": commit.sha[:24],
        "id": repo.id,
        "author": repo.id.partition("/")[0],
        "sha": commit.sha,
        "lastModified": _time(commit.created_at),
        "createdAt": _time(first),
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "downloads": repo.downloads,
        "likes": repo.likes,
        "trendingScore": 0,
        "tags": commit.tags(),
    }
    if repo.kind == "models":
        info["modelId"] = repo.id
        info |= {key: commit.card.get(key) for key in ("library_name", "pipeline_tag")}
    info["cardData"] = dict(commit.card)
    info["siblings"] = [_sibling(path, file, sizes=sizes) for path, file in commit.files.items()]
    return info


def _time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _sibling(path: str, file: StoredFile, *, sizes: bool) -> dict[str, Any]:
    if not sizes:
        return {"rfilename": path}
    sibling: dict[str, Any] = {"rfilename": path, "size": file.size, "blobId": file.oid}
    if file.lfs:
        sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return sibling


def _tree_entries(files: Mapping[str, StoredFile], below: str, *, recursive: bool) -> list[dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for path, file in files.items():
        if not path.startswith(below):
            continue
        parents = _parents(path, below)
        for parent in parents if recursive else parents[:1]:
            entries[parent] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": parent}
        if recursive or not parents:
            entries[path] = _file_entry(path, file)
    return list(entries.values())


def _parents(path: str, below: str) -> list[str]:
    steps: Iterable[re.Match[str]] = re.finditer("/", path[len(below) :])
    return [path[: len(below) + step.start()] for step in steps]


def _git_oid(commit: Commit, path: str) -> str | None:
    """Of the content itself, by which the client knows what it need not send again; None for a new file."""
    file = commit.files.get(path)
    if file is None:
        return None
    return hashlib.sha1(b"blob %d\0" % file.size + file.content.read_bytes()).hexdigest()


def _file_entry(path: str, file: StoredFile) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
    if file.lfs:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return entry
