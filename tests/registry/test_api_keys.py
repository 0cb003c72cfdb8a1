from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import text, update

from lora_hub_sdk.errors import ConfigurationError, KeyNotFoundError, NameTakenError
from lora_hub_sdk.registry.api_keys import RIGHTS, ApiKey, ApiKeys, Right
from lora_hub_sdk.registry.schema import ensure_schema, open_database
from lora_hub_sdk.registry.tables import ApiKeyRow


@pytest.fixture(params=["file", "memory", "postgres"])
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ApiKeys]:
    known = {"file": str(tmp_path / "hub.db"), "memory": ":memory:"}
    engine = open_database(known.get(request.param) or str(request.getfixturevalue("postgres")))
    ensure_schema(engine)
    yield ApiKeys(engine)
    engine.dispose()


def test_a_secret_finds_its_key_and_nobody_elses(keys: ApiKeys) -> None:
    ann, secret_of_ann = keys.create("ann", namespace="a", rights=("read", "generate"))
    ben, secret_of_ben = keys.create("ben", namespace="b", rights=RIGHTS)
    assert (keys.find(secret_of_ann), keys.find(secret_of_ben)) == (ann, ben)
    assert (ann.name, ann.namespace, ann.rights) == ("ann", "a", ("generate", "read"))
    assert ann.allows("read")
    assert not ann.allows("register")
    assert ben.allows("metrics")
    assert len(secret_of_ann) == 46
    assert secret_of_ann.startswith(ann.prefix)
    assert ann.prefix != ben.prefix
    assert ann.created_at.tzinfo is not None
    assert keys.list() == (ann, ben)
    swapped = secret_of_ann.swapcase()
    wrong = [
        "",
        "lh_",
        ann.prefix,
        secret_of_ann[:-1],
        f"{secret_of_ann}x",
        f" {secret_of_ann}",
        swapped,
        "lh_" + "A" * 43,
    ]
    assert [keys.find(secret) for secret in wrong] == [None] * len(wrong)
    assert keys.find("lh_\udcff" + "é" * 42) is None


def test_the_database_holds_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "hub.db"
    engine = open_database(str(file))
    ensure_schema(engine)
    key, secret = ApiKeys(engine).create("ann", namespace="a")
    engine.dispose()
    with sqlite3.connect(file) as database:
        stored = "\n".join(database.iterdump())
    assert key.prefix in stored
    assert secret not in stored
    assert secret[9:] not in stored
    assert secret[3:] not in stored
    assert secret not in repr(key)


def test_a_revoked_key_is_found_no_more_and_stays_in_the_list(keys: ApiKeys) -> None:
    made, secret = keys.create("ann", namespace="a")
    other, other_secret = keys.create("ben", namespace="a")
    ended = keys.revoke("ann")
    assert ended.revoked_at is not None
    assert replace(ended, revoked_at=None) == made
    assert not ended.is_valid()
    assert keys.find(secret) is None
    assert keys.find(other_secret) == other
    assert keys.revoke("ann") == ended
    assert keys.list() == (ended, other)
    with pytest.raises(KeyNotFoundError, match=r"no API key 'cat'.*keys list"):
        keys.revoke("cat")


def test_a_name_is_given_once_even_to_many_at_once(keys: ApiKeys) -> None:
    keys.create("ann", namespace="a")
    keys.revoke("ann")
    with pytest.raises(NameTakenError, match="'ann'"):
        keys.create("ann", namespace="b")
    made: list[ApiKey] = []
    refused: list[Exception] = []

    def one() -> None:
        try:
            made.append(keys.create("cat", namespace="c")[0])
        except NameTakenError as error:
            refused.append(error)

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(refused) == 5
    assert [key.name for key in keys.list()] == ["ann", "cat"]


def test_an_expired_key_is_found_no_more(keys: ApiKeys) -> None:
    end = datetime.now(timezone(timedelta(hours=5))) + timedelta(days=1)
    key, secret = keys.create("ann", namespace="a", expires_at=end)
    assert key.expires_at == end
    assert keys.find(secret) == key
    assert key.is_valid(end - timedelta(seconds=1))
    assert not key.is_valid(end)
    with keys._engine.begin() as connection:
        connection.execute(update(ApiKeyRow).values(expires_at=datetime.now(UTC) - timedelta(seconds=1)))
    assert keys.find(secret) is None
    (known,) = keys.list()
    assert not known.is_valid()
    assert known.revoked_at is None


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"name": ""}, "name="),
        ({"name": " ann"}, "name="),
        ({"name": "a" * 129}, "1 to 128"),
        ({"name": "a\nb"}, "cannot be shown"),
        ({"namespace": ""}, "namespace="),
        ({"namespace": "a" * 129}, "namespace="),
        ({"rights": ()}, "expected one or more of generate, read, register, metrics"),
        ({"rights": ("read", "write")}, "'write'"),
        ({"expires_at": datetime(2999, 1, 1)}, "no time zone"),
        ({"expires_at": datetime(2020, 1, 1, tzinfo=UTC)}, "is past"),
    ],
)
def test_a_key_that_makes_no_sense_is_refused_and_not_kept(
    tmp_path: Path, given: dict[str, object], problem: str
) -> None:
    engine = open_database(str(tmp_path / "hub.db"))
    ensure_schema(engine)
    keys = ApiKeys(engine)
    with pytest.raises(ConfigurationError, match=problem):
        keys.create(**{"name": "ann", "namespace": "a", **given})  # type: ignore[arg-type]
    assert keys.list() == ()
    engine.dispose()


def test_one_right_may_be_given_as_its_name(keys: ApiKeys) -> None:
    right: Right = "metrics"
    assert keys.create("ann", namespace="a", rights=right)[0].rights == ("metrics",)  # type: ignore[arg-type]


def test_what_wrote_a_right_that_is_not_known_here_gives_nothing_more(keys: ApiKeys) -> None:
    key, secret = keys.create("ann", namespace="a", rights=("read",))
    with keys._engine.begin() as connection:
        connection.execute(text('UPDATE api_keys SET rights = \'["read", "fly"]\''))
    found = keys.find(secret)
    assert found is not None
    assert [right for right in RIGHTS if found.allows(right)] == ["read"]
    assert found.id == key.id
