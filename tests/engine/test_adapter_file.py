"""An adapter's files become factors quickly, and never other ones than those that were registered."""

from __future__ import annotations

import gc
import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_hub_sdk.engine.adapter_file import load_factors, open_factors
from lora_hub_sdk.errors import AdapterChangedError
from lora_hub_sdk.registry.admission import WEIGHTS_FILE
from lora_hub_sdk.testing import raw_factors, tiny_adapter
from lora_hub_sdk.types import Adapter
from tests.support import adapter_at

Header = dict[str, Any]


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Adapter:
    return adapter_at(tiny_adapter(tmp_path / "one", base), base)


def weights_of(adapter: Adapter) -> Path:
    return adapter.folder / WEIGHTS_FILE


def header_of(content: bytes) -> tuple[bytes, bytes]:
    """The header and what is behind it."""
    start = 8 + int.from_bytes(content[:8], "little")
    return content[8:start], content[start:]


def with_header(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_factors_are_what_the_file_holds(base: Path, tmp_path: Path, dtype: str) -> None:
    adapter = adapter_at(tiny_adapter(tmp_path / dtype, base, dtype=dtype, rank_pattern={"v_proj": 2}), base)
    found = load_factors(adapter)
    expected = raw_factors(adapter.folder)
    assert found.digest == adapter.digest
    assert found.modules.keys() == expected.keys()
    for module, (a, b, scale) in expected.items():
        factors = found.modules[module]
        assert str(factors.a.dtype) == f"torch.{dtype}"
        assert factors.a.to(a.dtype).equal(a)
        assert factors.b.to(b.dtype).equal(b)
        assert factors.scale == scale


def test_factors_take_the_memory_of_their_file_once(adapter: Adapter) -> None:
    factors = load_factors(adapter)
    assert len({module.a.untyped_storage().data_ptr() for module in factors.modules.values()}) == 1
    assert factors.size_bytes == weights_of(adapter).stat().st_size == adapter.size_bytes


def test_the_memory_is_freed_with_the_last_factor(adapter: Adapter) -> None:
    opened = open_factors(adapter)
    memory = weakref.ref(opened.weights)
    last = next(iter(opened.factors.modules.values())).b
    gc.disable()  # nothing may wait for the collector
    try:
        del opened
        assert memory() is not None
        del last
        assert memory() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("blanks", range(8))
def test_tensors_at_odd_addresses_are_read_too(adapter: Adapter, base: Path, blanks: int) -> None:
    expected = load_factors(adapter).modules
    header, data = header_of(weights_of(adapter).read_bytes())
    weights_of(adapter).write_bytes(with_header(header + b" " * blanks, data))
    found = load_factors(adapter_at(adapter.folder, base)).modules
    assert all(found[module].a.equal(expected[module].a) for module in expected)
    assert all(found[module].b.equal(expected[module].b) for module in expected)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, "adapter_config.json"])
def test_a_missing_file_is_named(adapter: Adapter, name: str) -> None:
    (adapter.folder / name).unlink()
    with pytest.raises(AdapterChangedError, match=f"gone from .*{name}.*register it again"):
        open_factors(adapter)


@pytest.mark.parametrize("make", [os.mkdir, pytest.param(getattr(os, "mkfifo", None), id="mkfifo")])
def test_what_is_no_file_neither_blocks_nor_stays_open(adapter: Adapter, make: Callable[[Path], None] | None) -> None:
    if make is None:
        pytest.skip("this system has no pipes with names")
    weights_of(adapter).unlink()
    make(weights_of(adapter))
    free = os.dup(0)
    os.close(free)
    with pytest.raises(AdapterChangedError, match="no regular file"):
        open_factors(adapter)
    again = os.dup(0)
    os.close(again)
    assert again == free


def test_a_changed_number_is_found_by_the_digest(adapter: Adapter) -> None:
    content = bytearray(weights_of(adapter).read_bytes())
    content[-1] ^= 1
    weights_of(adapter).write_bytes(content)
    opened = open_factors(adapter)
    with pytest.raises(AdapterChangedError, match=r"digest .* remove it and register it again"):
        opened.verify()
    with pytest.raises(AdapterChangedError, match=adapter.digest[:12]):
        load_factors(adapter)


def test_a_changed_configuration_is_found_by_the_digest(adapter: Adapter) -> None:
    path = adapter.folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 16}))
    with pytest.raises(AdapterChangedError, match="digest"):
        open_factors(adapter).verify()


@pytest.mark.parametrize("size", [-1, 1])
def test_a_file_of_another_size_is_not_even_opened(adapter: Adapter, size: int) -> None:
    content = weights_of(adapter).read_bytes()
    weights_of(adapter).write_bytes(content[:-1] if size < 0 else content + b"\0")
    with pytest.raises(AdapterChangedError, match=f"{adapter.size_bytes} bytes .* now holds"):
        open_factors(adapter)


def test_factors_stay_what_they_were_when_the_file_changes_under_them(adapter: Adapter, base: Path) -> None:
    # The reference is a map of the file and must be copied: reading it later would end the process.
    expected = {module: (a.clone(), b.clone()) for module, (a, b, _) in raw_factors(adapter.folder).items()}
    opened = open_factors(adapter)
    with weights_of(adapter).open("r+b") as file:
        file.write(bytes(adapter.size_bytes))
    os.truncate(weights_of(adapter), 0)
    opened.verify()
    for module, (a, b) in expected.items():
        assert opened.factors.modules[module].a.equal(a)
        assert opened.factors.modules[module].b.equal(b)


def only_a(header: Header) -> None:
    header.update({key.replace("lora_B", "lora_C"): header.pop(key) for key in list(header) if "lora_B" in key})


def far_away(header: Header) -> None:
    for key in header.keys() - {"__metadata__"}:
        header[key]["data_offsets"] = [1 << 60, 1 << 61]


def before_the_file(header: Header) -> None:
    for key in header.keys() - {"__metadata__"}:
        header[key]["data_offsets"] = [-(1 << 20), 4]


def huge(header: Header) -> None:
    for key in header.keys() - {"__metadata__"}:
        header[key]["shape"] = [1 << 31, 1 << 31]


def cube(header: Header) -> None:
    for key in header.keys() - {"__metadata__"}:
        header[key]["shape"].append(1)


def other_ranks(header: Header) -> None:
    for key in header.keys() - {"__metadata__"}:
        header[key]["shape"][0] //= 2


def whole_numbers(header: Header) -> None:
    for key in header.keys() - {"__metadata__"}:
        header[key]["dtype"] = "I32"


def words(header: Header) -> None:
    for key in header.keys() - {"__metadata__"}:
        header[key] = "a tensor"


@pytest.mark.parametrize("change", [only_a, far_away, before_the_file, huge, cube, other_ranks, whole_numbers, words])
def test_a_header_that_lies_is_a_changed_adapter(adapter: Adapter, change: Callable[[Header], None]) -> None:
    before = weights_of(adapter).read_bytes()
    header, data = header_of(before)
    lies = json.loads(header)
    change(lies)
    after = with_header(json.dumps(lies, separators=(",", ":")).encode(), data)
    # Its size alone would give it away.
    weights_of(adapter).write_bytes(after[: len(before)].ljust(len(before), b"\0"))
    with pytest.raises(AdapterChangedError, match="digest"):
        open_factors(adapter)


@pytest.mark.parametrize(
    "header", [b"", b"[]", b"{", b"\xff\xff", b"[" * 100_000, b'"' + b"x" * 100], ids=lambda header: str(header[:4])
)
def test_a_header_that_is_none_is_a_changed_adapter(adapter: Adapter, header: bytes) -> None:
    content = with_header(header, b"")[: adapter.size_bytes].ljust(adapter.size_bytes, b"\0")
    weights_of(adapter).write_bytes(content)
    with pytest.raises(AdapterChangedError, match="digest"):
        open_factors(adapter)
