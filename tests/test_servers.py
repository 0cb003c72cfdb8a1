"""The servers that other tests lean on."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from sqlalchemy import create_engine, text

from tests.servers import Server, chroma_running, find_postgres, free_port, is_taken, postgres_running, start_chroma


def count_collections(url: str) -> int:
    import chromadb
    from chromadb.config import Settings

    address = urlsplit(url)
    settings = Settings(anonymized_telemetry=False)
    return chromadb.HttpClient(
        host=str(address.hostname), port=address.port or 0, settings=settings
    ).count_collections()


# -- Chroma --------------------------------------------------------------------------------------------------


def test_chroma_answers_the_real_client(chroma_server: str) -> None:
    assert count_collections(chroma_server) >= 0


def test_a_killed_chroma_comes_back_on_its_port_with_what_it_held(tmp_path: Path) -> None:
    import chromadb

    server = start_chroma(tmp_path / "data")
    try:
        chromadb.HttpClient(host="127.0.0.1", port=server.port).create_collection("kept", embedding_function=None)
    finally:
        server.kill()
    assert not server.runs
    assert not is_taken(server.port)
    with chroma_running(tmp_path / "data", server.port) as url:
        assert url == server.url
        assert count_collections(url) == 1
    assert not is_taken(server.port)


def test_a_taken_port_is_never_mistaken_for_a_server_of_ours(tmp_path: Path, chroma_server: str) -> None:
    taken = urlsplit(chroma_server).port or 0
    with pytest.raises(RuntimeError, match="did not start"):
        start_chroma(tmp_path / "data", taken)
    assert is_taken(taken)


def test_a_chroma_is_stopped_when_the_block_fails(tmp_path: Path) -> None:
    port = free_port()
    with pytest.raises(ZeroDivisionError), chroma_running(tmp_path / "data", port):
        _ = 1 / 0
    assert not is_taken(port)


# -- PostgreSQL ----------------------------------------------------------------------------------------------


def test_each_test_has_a_database_of_its_own(postgres: str) -> None:
    engine = create_engine(postgres)
    with engine.begin() as connection:
        assert connection.scalar(text("SELECT current_database()")) == postgres.rpartition("/")[2]
        assert connection.scalar(text("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")) == 0
        connection.execute(text("CREATE TABLE mine (id integer)"))
    # Left open on purpose: the database goes all the same.
    engine.connect()


def test_a_database_goes_with_its_test(postgres_server: Server, postgres: str) -> None:
    with psycopg.connect(host="127.0.0.1", port=postgres_server.port, user="postgres") as connection:
        found = connection.execute("SELECT datname FROM pg_database WHERE datname LIKE 'test_%'").fetchall()
    assert found == [(postgres.rpartition("/")[2],)]


def test_postgres_sorts_as_most_servers_do_and_listens_on_loopback_only(postgres: str) -> None:
    engine = create_engine(postgres)
    with engine.connect() as connection:
        names = text("SELECT name FROM (VALUES ('b'), ('A'), ('B'), ('a')) AS list (name) ORDER BY name")
        if int(connection.scalar(text("SHOW server_version_num")) or 0) >= 150000:
            assert list(connection.scalars(names)) == ["a", "A", "b", "B"]
        assert connection.scalar(text("SHOW listen_addresses")) == "127.0.0.1"
        assert connection.scalar(text("SHOW unix_socket_directories")) == ""
    engine.dispose()


def test_a_postgres_is_stopped_when_the_block_fails(postgres_server: Server) -> None:
    binaries = find_postgres()
    assert binaries is not None
    with pytest.raises(ZeroDivisionError), postgres_running(binaries) as server:
        _ = 1 / 0
    assert not server.runs
    assert not is_taken(server.port)
    # And only this one.
    assert postgres_server.runs
