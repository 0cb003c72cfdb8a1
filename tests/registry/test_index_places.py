"""Where an index lives: folders that are reopened, damaged, deleted and contested, and servers that fail."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FunctionType
from typing import Final

import pytest

from lora_hub_sdk.errors import ConfigurationError, IndexDamagedError, IndexUnavailableError
from lora_hub_sdk.registry.chroma_client import ChromaServer
from lora_hub_sdk.registry.chroma_index import ChromaIndex
from lora_hub_sdk.registry.exact_index import ExactIndex
from lora_hub_sdk.registry.index import IndexFilter, VectorIndex
from lora_hub_sdk.registry.index_places import open_index
from lora_hub_sdk.testing.index_suite import assert_finds, entries
from tests.servers import Server, start_chroma

_HELD: Final = entries(1500)
_HERE: Final = IndexFilter("here", "base")

Opener = Callable[[str | Path | None], VectorIndex]


@pytest.fixture
def opened() -> Iterator[Opener]:
    """Opens indexes, and closes them after the test."""
    all_opened: list[VectorIndex] = []

    def open_one(place: str | Path | None) -> VectorIndex:
        all_opened.append(open_index(place, "hub-x"))
        return all_opened[-1]

    yield open_one
    for index in all_opened:
        index.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = start_chroma(tmp_path / "data")
    yield running
    running.kill()


def fill(index: VectorIndex) -> None:
    index.put(_HELD)
    index.set_stamp(3)


def use(index: VectorIndex) -> None:
    """Everything that may meet a damaged file."""
    index.stamp()
    index.count()
    index.keys()
    index.read([_HELD[0].key])
    index.search([_HELD[0].vector], 3, _HERE)
    index.put(entries(3, seed=9, first=5000))
    index.delete([_HELD[1].key])


def assert_recovers(index: VectorIndex) -> None:
    """Damaged or not, it works as a new one after ``clear``."""
    index.clear()
    assert index.stamp() is None
    assert index.keys() == set()
    fill(index)
    assert index.stamp() == 3
    assert index.count() == len(_HELD)
    assert_finds(index, _HELD, _HELD[7].vector, 5, _HERE)


# -- places ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "",
        "ftp://host:1",
        "http://",
        "http://host:port",
        "http://host:99999",
        "http://user@host:1",
        "http://host:1/path",
    ],
)
def test_a_place_that_cannot_be_used_is_refused(place: str) -> None:
    with pytest.raises(ConfigurationError, match="expected"):
        open_index(place, "hub-x")


def test_a_file_is_no_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigurationError, match="this is a file"):
        open_index(tmp_path / "file", "hub-x")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["", "x", "-x", "a b", "x" * 47])
def test_a_name_that_chroma_would_refuse_leaves_the_folder_free(name: str, tmp_path: Path, opened: Opener) -> None:
    with pytest.raises(ConfigurationError, match="index name"):
        open_index(tmp_path / "index", name)
    assert process_opens(tmp_path / "index") == "ChromaIndex"


def test_the_longest_name_works(tmp_path: Path) -> None:
    index = open_index(tmp_path / "index", "x" * 46)
    index.put(_HELD[:2])
    assert index.count() == 2
    index.close()


def test_names_are_told_apart_in_one_folder(tmp_path: Path) -> None:
    first, second = open_index(tmp_path / "index", "hub-a"), open_index(tmp_path / "index", "hub-a-b")
    first.put(_HELD[:2])
    first.set_stamp(1)
    assert second.keys() == set()
    assert second.stamp() is None
    first.close()
    second.put(_HELD[2:3])
    assert second.count() == 1
    second.close()


# -- folders -------------------------------------------------------------------------------------------------------


def test_a_reopened_folder_keeps_keys_and_stamp(tmp_path: Path, opened: Opener) -> None:
    first = opened(tmp_path / "index")
    fill(first)
    first.close()
    first.close()
    again = opened(tmp_path / "index")
    assert again.stamp() == 3
    assert again.keys() == {entry.key for entry in _HELD}
    assert_finds(again, _HELD, _HELD[7].vector, 5, _HERE)


def test_a_closed_index_does_not_work_on_the_folder_any_more(tmp_path: Path, opened: Opener) -> None:
    index = opened(tmp_path / "index")
    index.close()
    with pytest.raises(IndexUnavailableError, match="was closed"):
        index.count()


def test_two_indexes_of_one_process_share_a_folder(tmp_path: Path, opened: Opener) -> None:
    first, second = opened(tmp_path / "index"), opened(tmp_path / "index")
    assert isinstance(first, ChromaIndex)
    assert isinstance(second, ChromaIndex)
    first.put(_HELD[:5])
    assert second.count() == 5
    second.clear()
    with pytest.raises(IndexDamagedError, match="emptied by another"):
        first.count()
    assert first.count() == 0
    first.put(_HELD[:3])
    assert second.keys() == {entry.key for entry in _HELD[:3]}
    first.close()
    assert second.count() == 3


def test_a_stamp_is_not_written_on_what_somebody_else_cleared(tmp_path: Path, opened: Opener) -> None:
    first, second = opened(tmp_path / "index"), opened(tmp_path / "index")
    fill(first)
    assert first.stamp() == 3
    second.clear()
    with pytest.raises(IndexDamagedError, match="emptied by another"):
        first.set_stamp(4)
    first.set_stamp(4)
    assert second.stamp() is None
    assert first.stamp() is None
    first.set_stamp(5)
    assert second.stamp() == 5


def test_a_folder_that_ended_its_process_is_not_opened_again_as_it_is(
    tmp_path: Path, opened: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    first = opened(tmp_path / "index")
    fill(first)
    note = tmp_path / "index.opening"
    assert note.exists(), "nothing was searched yet, and Chroma's native code may still die of what it reads"
    first.search([_HELD[0].vector], 1, IndexFilter("default"))
    assert not note.exists()
    first.close()
    for _ in range(2):
        again = opened(tmp_path / "index")
        assert again.count() == len(_HELD)
        again.close()
    assert not note.exists()
    note.touch()  # as a crash leaves it
    assert opened(tmp_path / "index").count() == 0
    assert "filled anew" in caplog.text


def test_clear_spares_what_chroma_did_not_write(tmp_path: Path, opened: Opener) -> None:
    index = opened(tmp_path / "index")
    fill(index)
    (tmp_path / "index" / "notes.txt").write_text("mine")
    (tmp_path / "index" / "own").mkdir()
    index.clear()
    assert (tmp_path / "index" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "index" / "own").is_dir()
    assert_recovers(index)


@pytest.mark.parametrize("reopen", [False, True])
def test_a_folder_deleted_under_a_running_index_recovers(tmp_path: Path, opened: Opener, reopen: bool) -> None:
    index = opened(tmp_path / "index")
    fill(index)
    shutil.rmtree(tmp_path / "index")
    if reopen:
        index.close()
        index = opened(tmp_path / "index")
    with suppress(IndexDamagedError):
        use(index)
    assert_recovers(index)


def _overwrite(file: Path) -> None:
    file.write_bytes(b"\xa5" * file.stat().st_size)


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _remove(file: Path) -> None:
    file.unlink()


def _scribble(file: Path) -> None:
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 5000] = b"\xff" * len(data[middle : middle + 5000])
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("which", ["chroma.sqlite3", "data_level0.bin", "header.bin", "length.bin", "link_lists.bin"])
@pytest.mark.parametrize("damage", [_overwrite, _truncate, _scribble, _remove])
@pytest.mark.parametrize("running", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_damaged_files_are_told_or_survived_and_clear_mends_them(
    tmp_path: Path, which: str, damage: FunctionType, running: bool
) -> None:
    # In a process of its own: Chroma checks nothing of its graph files, so that a damaged one can end the process by a
    # signal, which nothing can catch. Then ``clear``, which reads nothing, must still mend it from the next process.
    folder = tmp_path / "index"
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.registry import test_index_places as here
from lora_hub_sdk.errors import IndexDamagedError
from lora_hub_sdk.registry.index_places import open_index
index = open_index({str(folder)!r}, "hub-x")
here.fill(index)
if not {running}:
    index.close()
files = sorted(Path({str(folder)!r}).rglob({which!r}))
assert files, sorted(Path({str(folder)!r}).rglob("*"))
for file in files:
    here.{damage.__name__}(file)
if not {running}:
    index = open_index({str(folder)!r}, "hub-x")
try:
    here.use(index)
    print("survived")
except IndexDamagedError as error:
    print("told")
here.assert_recovers(index)
index.close()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    if which.endswith(".bin") and -done.returncode in (signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS):
        index = open_index(folder, "hub-x")
        assert isinstance(index, ChromaIndex)
        assert_recovers(index)
        index.close()
        return
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() in ("told", "survived")


# -- several processes -----------------------------------------------------------------------------------------------

_OTHER: Final = """
import sys
from lora_hub_sdk.registry.index_places import open_index
index = open_index(sys.argv[1], "hub-x")
print(type(index).__name__, flush=True)
if type(index).__name__ == "ChromaIndex":
    index.stamp()
sys.stdin.readline()
"""


def start_process(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """Another process with the folder open; the kind of index it got."""
    process = subprocess.Popen(
        [sys.executable, "-c", _OTHER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def process_opens(folder: Path) -> str:
    process, kind = start_process(folder)
    process.communicate("\n", timeout=60)
    return kind


def test_a_second_process_gets_memory_until_the_first_is_killed(
    tmp_path: Path, opened: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "index"
    holder, kind = start_process(folder)
    try:
        assert kind == "ChromaIndex"
        with caplog.at_level(logging.WARNING):
            assert isinstance(opened(folder), ExactIndex)
            assert isinstance(opened(folder), ExactIndex)
        told = [record.getMessage() for record in caplog.records if "another process uses it" in record.getMessage()]
        assert len(told) == 1
        assert str(folder) in told[0]
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        index = opened(folder)
        assert isinstance(index, ChromaIndex)
        index.put(_HELD[:3])
        assert index.count() == 3
    finally:
        holder.kill()
        holder.communicate()


def test_the_folder_is_free_once_its_last_index_is_closed(tmp_path: Path, opened: Opener) -> None:
    folder = tmp_path / "index"
    first, second = opened(folder), opened(folder)
    first.close()
    assert process_opens(folder) == "ExactIndex"
    second.close()
    assert process_opens(folder) == "ChromaIndex"


def test_a_forked_child_neither_uses_nor_frees_its_parents_folder(tmp_path: Path, opened: Opener) -> None:
    # A fresh interpreter forks, because this one may have threads.
    script = """
import os, sys
from lora_hub_sdk.errors import IndexUnavailableError
from lora_hub_sdk.registry.index_places import open_index
index = open_index(sys.argv[1], "hub-x")
index.stamp()
child = os.fork()
if child == 0:
    try:
        index.count()
        os._exit(1)
    except IndexUnavailableError as error:
        assert "fork" in str(error)
    index.close()
    os._exit(0 if type(open_index(sys.argv[1], "hub-x")).__name__ == "ExactIndex" else 2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("held", flush=True)
sys.stdin.readline()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "index")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "held"
    assert isinstance(opened(tmp_path / "index"), ExactIndex)
    process.communicate("\n", timeout=60)
    assert process.returncode == 0


# -- servers ---------------------------------------------------------------------------------------------------------


def test_a_stopped_server_is_unavailable_until_it_is_back(tmp_path: Path, server: Server, opened: Opener) -> None:
    index = opened(server.url)
    fill(index)
    server.stop()
    calls: list[Callable[[], object]] = [
        index.stamp,
        index.count,
        index.keys,
        index.clear,
        lambda: index.set_stamp(9),
        lambda: index.put(_HELD[:2]),
        lambda: index.delete([_HELD[0].key]),
        lambda: index.read([_HELD[0].key]),
        lambda: index.search([_HELD[0].vector], 3, _HERE),
        opened(server.url).count,
    ]
    for call in calls:
        with pytest.raises(IndexUnavailableError, match=server.url):
            call()
    again = start_chroma(tmp_path / "data", server.port)
    assert index.stamp() == 3
    assert_finds(index, _HELD, _HELD[7].vector, 5, _HERE)
    again.kill()


def test_a_server_that_never_answers_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        index = ChromaIndex(ChromaServer(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2), "hub-x")
        with pytest.raises(IndexUnavailableError, match="Timeout"):
            index.count()


def test_a_server_that_stops_answering_is_unavailable(server: Server) -> None:
    index = ChromaIndex(ChromaServer(server.url, timeout=1.0), "hub-x")
    index.put(_HELD[:2])
    server.pause()
    with pytest.raises(IndexUnavailableError, match="Timeout"):
        index.count()
    server.resume()
    assert index.count() == 2
    index.close()


def test_several_clients_of_a_server_see_each_others_partitions(server: Server, opened: Opener) -> None:
    first, second = opened(server.url), opened(server.url)
    first.put(_HELD[:5])
    assert second.count() == 5
    later = entries(5, seed=4, base_model="other", first=9000)
    second.put(later)
    assert_finds(first, [*_HELD[:5], *later], later[0].vector, 10, IndexFilter("here"))
    second.clear()
    assert first.keys() == set()
    assert first.search([_HELD[0].vector], 3, _HERE) == [[]]
    first.put(_HELD[:2])
    assert second.keys() == {entry.key for entry in _HELD[:2]}
    assert second.stamp() is None


def test_clear_on_a_server_spares_other_indexes(server: Server) -> None:
    mine, other = open_index(server.url, "hub-a"), open_index(server.url, "hub-a-b")
    mine.put(_HELD[:3])
    other.put(_HELD[:4])
    other.set_stamp(8)
    mine.clear()
    assert mine.count() == 0
    assert other.count() == 4
    assert other.stamp() == 8
    mine.close()
    other.close()
