"""``lora-hub keys`` as people and scripts run it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lora_hub_sdk.cli import app
from lora_hub_sdk.hub import LoraHub


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "hub.db"


def run(database: Path, *args: str) -> Result:
    return CliRunner().invoke(app, ["keys", *args, "--database", str(database)])


def data(database: Path, *args: str) -> Any:
    result = run(database, *args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_key_is_made_before_any_adapter_and_shown_once(database: Path) -> None:
    made = data(database, "create", "ann", "--namespace", "team", "--right", "read", "--right", "register")
    assert (made["name"], made["namespace"], made["rights"]) == ("ann", "team", ["read", "register"])
    with LoraHub(database) as hub:
        found = hub.keys.find(made["secret"])
        assert found is not None
        assert (found.name, found.namespace, found.rights) == ("ann", "team", ("read", "register"))
    for as_json in ((), ("--json",)):
        listed = run(database, "list", *as_json).stdout
        assert made["prefix"] in listed
        assert made["secret"] not in listed


def test_people_can_copy_the_secret_from_a_line_of_its_own(database: Path) -> None:
    result = run(database, "create", "ann", "--days", "30")
    lines = result.stdout.splitlines()
    assert "generate, read, until " in lines[0]
    with LoraHub(database) as hub:
        found = hub.keys.find(lines[1])
    assert found is not None
    assert found.expires_at is not None
    assert abs(found.expires_at - datetime.now(UTC) - timedelta(days=30)) < timedelta(hours=1)


def test_a_revoked_key_opens_nothing_and_is_listed_as_such(database: Path) -> None:
    secret = data(database, "create", "ann")["secret"]
    data(database, "create", "ben", "--namespace", "team")
    assert data(database, "revoke", "ann")["valid"] is False
    with LoraHub(database) as hub:
        assert hub.keys.find(secret) is None
    assert [(key["name"], key["valid"]) for key in data(database, "list")] == [("ann", False), ("ben", True)]
    assert [key["name"] for key in data(database, "list", "--namespace", "team")] == ["ben"]
    shown = run(database, "list").stdout
    assert "revoked" in shown
    assert "valid" in shown


@pytest.mark.parametrize(
    ("args", "kind"),
    [
        (("create", "ann"), "NameTakenError"),
        (("create", "ben", "--right", "fly"), "ConfigurationError"),
        (("create", "ben", "--days", "-1"), "ConfigurationError"),
        (("create", "ben", "--days", "1e12"), "ConfigurationError"),
        (("create", "ben", "--days", "nan"), "ConfigurationError"),
        (("revoke", "ben"), "KeyNotFoundError"),
    ],
)
def test_what_cannot_be_is_refused(database: Path, args: tuple[str, ...], kind: str) -> None:
    data(database, "create", "ann")
    result = run(database, *args, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == kind
    assert [key["name"] for key in data(database, "list")] == ["ann"]


def test_looking_at_keys_makes_no_database(database: Path) -> None:
    for args in (("list",), ("revoke", "ann")):
        assert run(database, *args).exit_code == 1
    assert not database.exists()
