from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, event, update

from lora_hub_sdk.errors import MissingRightError, StorageError, UnauthorizedError
from lora_hub_sdk.registry.api_keys import RIGHTS, ApiKeys
from lora_hub_sdk.registry.schema import ensure_schema, open_database
from lora_hub_sdk.registry.tables import ApiKeyRow
from lora_hub_sdk.server.auth import Caller, Doorkeeper


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(str(tmp_path / "hub.db"))
    ensure_schema(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def keys(engine: Engine) -> ApiKeys:
    return ApiKeys(engine)


@pytest.fixture
def questions(engine: Engine) -> list[str]:
    """The statements that the database was sent."""
    sent: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *given: sent.append(given[2]))
    return sent


def test_a_key_brings_its_namespace_and_its_rights(keys: ApiKeys) -> None:
    _, secret = keys.create("ann", namespace="a", rights=("read",))
    door = Doorkeeper(keys, namespace="ignored")
    expected = Caller("ann", "a", frozenset({"read"}))
    for header in (f"Bearer {secret}", f"bearer  {secret} ", f"BEARER {secret}"):
        assert door.admit(header) == expected
        assert asyncio.run(door.aadmit(header)) == expected


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic YTpi",
        "{secret}",
        "Bearer {secret} {secret}",
        "Token {secret}",
        "Bearer é",
        "Bearer \udcff",
    ],
)
def test_a_header_without_a_key_is_told_how_to_send_one(keys: ApiKeys, header: str | None) -> None:
    _, secret = keys.create("ann", namespace="a")
    door = Doorkeeper(keys)
    with pytest.raises(UnauthorizedError, match="Authorization: Bearer lh_") as refused:
        door.admit(header and header.replace("{secret}", secret))
    assert secret not in str(refused.value)


def test_unknown_revoked_and_expired_keys_are_refused_alike(keys: ApiKeys, engine: Engine) -> None:
    _, revoked = keys.create("revoked", namespace="a")
    _, expired = keys.create("expired", namespace="a", expires_at=datetime.now(UTC) + timedelta(days=1))
    keys.revoke("revoked")
    with engine.begin() as connection:
        past = datetime.now(UTC) - timedelta(seconds=1)
        connection.execute(update(ApiKeyRow).where(ApiKeyRow.name == "expired").values(expires_at=past))
    door = Doorkeeper(keys)
    told = set()
    for secret in (revoked, expired, "lh_" + "A" * 43, "sk-other", "lh_';drop_table--"):
        for _ in range(2):
            with pytest.raises(UnauthorizedError) as refused:
                door.admit(f"Bearer {secret}")
            told.add(str(refused.value))
        with pytest.raises(UnauthorizedError):
            asyncio.run(door.aadmit(f"Bearer {secret}"))
    assert len(told) == 1


def test_a_key_is_looked_up_once_in_a_while_and_a_revoked_one_stops_then(keys: ApiKeys, questions: list[str]) -> None:
    _, secret = keys.create("ann", namespace="a")
    clock = Clock()
    door = Doorkeeper(keys, clock=clock)
    questions.clear()
    for _ in range(5):
        door.admit(f"Bearer {secret}")
    assert len([sent for sent in questions if "api_keys" in sent]) == 1
    keys.revoke("ann")
    clock.now += 1.9
    assert door.admit(f"Bearer {secret}").id == "ann"
    clock.now += 0.1
    for _ in range(2):
        with pytest.raises(UnauthorizedError):
            door.admit(f"Bearer {secret}")


def test_a_kept_key_still_expires_on_time(keys: ApiKeys) -> None:
    _, secret = keys.create("ann", namespace="a", expires_at=datetime.now(UTC) + timedelta(seconds=0.3))
    door = Doorkeeper(keys, clock=lambda: 0.0)
    door.admit(f"Bearer {secret}")
    until = datetime.now(UTC) + timedelta(seconds=10)
    while keys.find(secret) is not None:
        assert datetime.now(UTC) < until
    with pytest.raises(UnauthorizedError):
        door.admit(f"Bearer {secret}")


def test_wrong_keys_fill_no_memory_and_are_not_kept_wrong(keys: ApiKeys) -> None:
    door = Doorkeeper(keys)
    for number in range(50):
        with pytest.raises(UnauthorizedError):
            door.admit(f"Bearer lh_{number:043}")
    assert not door._kept
    _, secret = keys.create("ann", namespace="a")
    assert door.admit(f"Bearer {secret}").id == "ann"
    assert secret not in repr(door._kept)


def test_a_database_that_does_not_answer_lets_nobody_in(keys: ApiKeys, engine: Engine) -> None:
    _, secret = keys.create("ann", namespace="a")
    file = Path(str(engine.url.database))
    engine.dispose()
    for each in file.parent.glob("hub.db*"):
        each.unlink()
    file.mkdir()
    with pytest.raises(StorageError):
        Doorkeeper(keys).admit(f"Bearer {secret}")


def test_without_keys_everybody_is_one_caller() -> None:
    door = Doorkeeper(None, namespace="team", rights=("generate",))
    for header in (None, "Bearer anything", "Basic x"):
        assert (
            door.admit(header)
            == asyncio.run(door.aadmit(header))
            == Caller("everybody", "team", frozenset({"generate"}))
        )
    assert Doorkeeper(None).admit(None).rights == set(RIGHTS)


def test_a_missing_right_is_named_with_those_there_are() -> None:
    caller = Caller("ann", "a", frozenset({"read", "generate"}))
    caller.require("read")
    with pytest.raises(
        MissingRightError, match="needs the right 'register', the API key has generate, read"
    ) as refused:
        caller.require("register")
    assert (refused.value.right, refused.value.has) == ("register", ("generate", "read"))
    with pytest.raises(MissingRightError, match="has none"):
        Caller("ben", "a", frozenset()).require("read")
