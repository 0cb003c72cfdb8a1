from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_hub_sdk.errors import AdapterNotFoundError, ConfigurationError
from lora_hub_sdk.registry.naming import can_be_stored, check_name
from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.retriever.query import names_of
from tests.registry.entries import ENCODER, entry, unit

ODD = ("a\0b", "\0", "a\ud800b", "\udfff")


@pytest.fixture(params=["sqlite", "postgres"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    place = str(tmp_path / "hub.db") if request.param == "sqlite" else str(request.getfixturevalue("postgres"))
    registry = Registry(place, index="exact", encoder=lambda: ENCODER)
    yield registry
    registry.close()


@pytest.mark.parametrize("name", ODD)
def test_a_name_that_no_database_can_hold_is_one_that_nobody_has(registry: Registry, name: str) -> None:
    registry.add(entry("a", unit(1, 0)))
    assert not can_be_stored(name)
    assert registry.find(name, "default") is None
    with pytest.raises(AdapterNotFoundError):
        registry.get(name, "default")
    with pytest.raises(ConfigurationError, match="exclude"):
        names_of("exclude", [name])
    with pytest.raises(ConfigurationError, match="cannot be shown"):
        check_name("name", name, 512)


@pytest.mark.parametrize("name", ["user/lora-x", "Übersetze 猫", "🦙", "' or 1=1 --", "%", "_", "a\\b"])
def test_any_other_name_finds_itself_and_nothing_else(registry: Registry, name: str) -> None:
    registry.add(entry("other", unit(1, 0)))
    assert registry.find(name, "default") is None
    added = registry.add(entry(name, unit(0, 1)))
    assert registry.find(name, "default") == added
    assert registry.find(name, "team") is None


def test_the_base_models_of_a_namespace_are_its_own(registry: Registry) -> None:
    registry.add(entry("a", unit(1, 0), base_model="red"))
    registry.add(entry("b", unit(1, 0), base_model="blue", namespace="team"))
    assert registry.base_models() == {"red", "blue"}
    assert (registry.base_models("team"), registry.base_models("nobody")) == ({"blue"}, set())
