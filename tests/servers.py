"""Real servers for the tests, each on a free loopback port: Chroma for the session or by hand, PostgreSQL with a
fresh database a test."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

#: Where `scripts/postgres.sh` unpacks PostgreSQL when it may not install it.
UNPACKED = Path(sys.prefix) / "postgresql"
#: Seconds until a server that has not answered is given up; two busy cores need some.
PATIENCE = 60.0


class Server:
    """A process that answers on ``127.0.0.1:port``; ``stop`` and ``kill`` may be called more than once."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.port = port
        self._process = process

    @property
    def url(self) -> str:
        """``http://127.0.0.1:PORT``."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to end, and see to it that it has."""
        self._process.send_signal(how)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()

    def pause(self) -> None:
        """Keep the connections, answer nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Answer again."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it without a word of warning, as a lost machine would."""
        self._process.kill()
        self._process.wait()


def free_port() -> int:
    """A loopback port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_taken(port: int) -> bool:
    """Whether something listens on a loopback port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# -- Chroma --------------------------------------------------------------------------------------------------


def start_chroma(path: Path, port: int | None = None) -> Server:
    """A Chroma server over the files in ``path``; give ``port`` to come back under an address used before."""
    path.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "ANONYMIZED_TELEMETRY": "False", "DO_NOT_TRACK": "1"}

    def launch(port: int) -> subprocess.Popen[bytes]:
        options = ["run", "--path", str(path), "--host", "127.0.0.1", "--port", str(port)]
        with (path.parent / f"{path.name}.log").open("wb") as log:
            return subprocess.Popen(
                [Path(sys.executable).with_name("chroma"), *options], env=environment, stdout=log, stderr=log
            )

    return _started(launch, _chroma_answers, path.parent / f"{path.name}.log", port)


@contextmanager
def chroma_running(path: Path, port: int | None = None) -> Iterator[str]:
    """The URL of a Chroma server over ``path`` that lives as long as the block."""
    server = start_chroma(path, port)
    try:
        yield server.url
    finally:
        server.stop()


@pytest.fixture(scope="session")
def chroma_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of one Chroma server for all tests; what they store needs names of their own."""
    with chroma_running(tmp_path_factory.mktemp("chroma") / "data") as url:
        yield url


def _chroma_answers(port: int) -> bool:
    # Without the proxies of the environment, which know nothing of this machine's loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/api/v2/heartbeat", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


# -- PostgreSQL ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """One PostgreSQL server for all tests, with user ``postgres`` and no password."""
    binaries = find_postgres()
    if binaries is None:
        pytest.skip("there is no PostgreSQL here; run scripts/postgres.sh, or install it")
    with postgres_running(binaries) as server:
        yield server


@pytest.fixture
def postgres(postgres_server: Server) -> Iterator[str]:
    """The URL of a database that was made for this test and goes with it."""
    from psycopg import connect

    name = f"test_{uuid.uuid4().hex[:12]}"
    with connect(_address(postgres_server.port), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
    yield f"postgresql+psycopg://postgres@127.0.0.1:{postgres_server.port}/{name}"
    with connect(_address(postgres_server.port), autocommit=True) as admin:
        # By force, because the test may have left connections behind.
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def find_postgres() -> Path | None:
    """The folder that holds ``initdb`` and ``postgres``: the one on PATH, else the newest that is known."""
    places = [Path(found).resolve().parent for name in ("initdb", "postgres") if (found := shutil.which(name))]
    if pg_config := shutil.which("pg_config"):
        asked = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)
        places.append(Path(asked.stdout.strip()))
    for root in (Path("/"), UNPACKED):
        # Debian keeps one folder a version: /usr/lib/postgresql/15/bin.
        places += sorted(root.glob("usr/lib/postgresql/*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    return next((place for place in places if (place / "initdb").is_file() and (place / "postgres").is_file()), None)


@contextmanager
def postgres_running(binaries: Path) -> Iterator[Server]:
    """A PostgreSQL server over a folder that is thrown away with it."""
    user = _other_user()
    # Not below pytest's folder nor below root's own TMPDIR, which another user may not enter.
    folder = Path(tempfile.mkdtemp(prefix="postgres-", dir=None if user is None else "/tmp"))
    uid, gid, groups = (None, None, None) if user is None else (user.pw_uid, user.pw_gid, list[int]())
    try:
        if uid is not None and gid is not None:
            os.chown(folder, uid, gid)
        data, log = folder / "data", folder / "log"
        environment = {**os.environ, **_libraries(binaries)}

        def spawn(program: str, *options: str) -> subprocess.Popen[bytes]:
            with log.open("ab") as sink:
                return subprocess.Popen(
                    [binaries / program, *options],
                    cwd=folder,
                    env=environment,
                    stdout=sink,
                    stderr=sink,
                    user=uid,
                    group=gid,
                    extra_groups=groups,
                )

        # English rules of order, as on most servers: sorting by code points would hide what depends on it.
        order = ("--locale-provider=icu", "--icu-locale=en-US") if _version(binaries) >= 15 else ()
        options = ("--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", *order)
        if spawn("initdb", "--pgdata", str(data), *options).wait():
            raise RuntimeError(f"initdb failed: {_tail(log)}")

        def launch(port: int) -> subprocess.Popen[bytes]:
            settings = (
                "listen_addresses=127.0.0.1",
                # The default folder of its Unix socket belongs to an installed server.
                "unix_socket_directories=",
                "max_connections=100",
                "fsync=off",
                "synchronous_commit=off",
                "full_page_writes=off",
                "jit=off",
            )
            flags = [flag for setting in settings for flag in ("-c", setting)]
            return spawn("postgres", "-D", str(data), "-p", str(port), *flags)

        server = _started(launch, _postgres_answers, log)
        try:
            yield server
        finally:
            # At once: nothing of it is needed any more, open connections included.
            server.stop(signal.SIGQUIT)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _other_user() -> pwd.struct_passwd | None:
    """Who runs the server when we are root, which PostgreSQL refuses."""
    if os.geteuid() != 0:
        return None
    known = {user.pw_name: user for user in pwd.getpwall()}
    return known.get("postgres") or known["nobody"]


def _libraries(binaries: Path) -> dict[str, str]:
    """The loader's path, where the server was unpacked rather than installed."""
    if not binaries.is_relative_to(UNPACKED):
        return {}
    folders = {str(library.parent) for library in UNPACKED.glob("**/*.so.*")}
    return {"LD_LIBRARY_PATH": ":".join(sorted(folders))}


def _version(binaries: Path) -> int:
    said = subprocess.run(
        [binaries / "postgres", "--version"], capture_output=True, text=True, env={**os.environ, **_libraries(binaries)}
    ).stdout
    return int(said.split()[2].partition(".")[0])


def _postgres_answers(port: int) -> bool:
    from psycopg import OperationalError, connect

    try:
        connect(_address(port)).close()
    except OperationalError:
        return False
    return True


def _address(port: int) -> str:
    return f"host=127.0.0.1 port={port} user=postgres dbname=postgres connect_timeout=5"


# -- any ------------------------------------------------------------------------------------------------------


def _started(
    launch: Callable[[int], subprocess.Popen[bytes]], answers: Callable[[int], bool], log: Path, port: int | None = None
) -> Server:
    """The server once it answers. A free port that somebody else takes meanwhile is no reason to fail."""
    for _ in range(3):
        chosen = port or free_port()
        if is_taken(chosen):
            # Another server would answer in the place of ours.
            continue
        process = launch(chosen)
        give_up = time.monotonic() + PATIENCE
        try:
            while process.poll() is None and time.monotonic() < give_up:
                if answers(chosen) and process.poll() is None:
                    return Server(process, chosen)
                time.sleep(0.05)
        except BaseException:
            process.kill()
            raise
        process.kill()
        process.wait()
    raise RuntimeError(f"the server did not start on port {chosen}: {_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:] if log.exists() else "somebody else holds the port"
