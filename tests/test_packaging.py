"""A built wheel in an environment of its own finds its migrations, its demo adapters and its integrations."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMOKE = """
import sys
from pathlib import Path
import lora_hub_sdk, langchain_lora_hub
from lora_hub_sdk.demo import demo_adapters
from lora_hub_sdk.registry.schema import migrations_folder, head
assert Path(lora_hub_sdk.__file__).is_relative_to(sys.argv[1]), lora_hub_sdk.__file__
assert migrations_folder().is_relative_to(sys.argv[1])
with lora_hub_sdk.LoraHub(sys.argv[2]) as hub:
    assert hub.list() == []
print(head(), len(demo_adapters()))
"""


def build(kind: str, source: Path, target: Path) -> Path:
    """Build without a fresh environment, as there may be no network."""
    subprocess.run(
        [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(target), str(source)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (found,) = target.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return found


def smoke(wheel: Path, folder: Path) -> str:
    """Unpack a wheel as an installer would, and run it outside the repository."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    code = f"import sys; sys.path.insert(0, {str(folder / 'site')!r})\n" + SMOKE
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "site"), str(folder / "hub.db")],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel(tmp_path: Path) -> None:
    assert smoke(build("wheel", ROOT, tmp_path / "dist"), tmp_path) == "0003 10"


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(tmp_path: Path) -> None:
    import tarfile

    sdist = build("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(path for path in tmp_path.iterdir() if (path / "pyproject.toml").is_file())
    assert smoke(build("wheel", source, tmp_path / "dist"), tmp_path) == "0003 10"


def test_editable_install_finds_the_migrations_beside_it() -> None:
    from lora_hub_sdk.registry.schema import migrations_folder

    assert migrations_folder() == ROOT / "migrations"
