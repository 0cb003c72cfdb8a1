"""Hundreds of damaged and hostile adapters: each is refused by name, nothing runs, nothing grows."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from lora_hub_sdk.errors import AdmissionError, DamagedWeightsError
from lora_hub_sdk.registry.admission import Admitted, admit
from lora_hub_sdk.registry.inspection import Inspection, inspect_adapter
from tests.registry.damage import LAYOUT, MARKER, SECRET, Damage, bomb, damages, write_good

CASES = damages()


def verdict(folder: Path) -> Admitted | AdmissionError:
    """What admission says; any other exception fails the test."""
    try:
        return admit(folder, source="mine", layout=LAYOUT)
    except AdmissionError as error:
        return error


@pytest.mark.timeout(5)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_damaged_adapter_is_refused_by_name_and_nothing_runs(case: Damage, tmp_path: Path) -> None:
    folder = write_good(tmp_path / "lora")
    good = verdict(folder)
    assert isinstance(good, Admitted)
    case.spoil(folder)
    found = verdict(folder)
    told = inspect_adapter(folder, source="mine", layout=LAYOUT)
    assert not (folder / MARKER).exists(), case.name
    if isinstance(found, Admitted):
        assert case.error is None, f"{case.name} was admitted"
        assert found.digest != good.digest, f"{case.name} has the digest of the whole adapter"
    else:
        assert case.error in (None, type(found)), f"{case.name}: {found!r}"
        assert str(found).isascii(), case.name
        assert str(found).isprintable(), case.name
        assert len(str(found)) < 1_500, case.name
        assert SECRET not in str(found), case.name
    assert_same(told, found, case.name)


def assert_same(told: Inspection, found: Admitted | AdmissionError, name: str) -> None:
    """Admission and inspection say the same, and the inspection is plain JSON."""
    json.dumps(asdict(told), allow_nan=False)
    passed = [check.passed for check in told.checks]
    if isinstance(found, Admitted):
        assert (told.accepted, told.error, told.message, told.digest) == (True, None, None, found.digest), name
        assert all(passed), name
    else:
        assert (told.accepted, told.error) == (False, type(found).__name__), name
        # Of several wrong tensors, safetensors names now one and now another.
        assert told.message == str(found) or isinstance(found, DamagedWeightsError), name
        assert passed.count(False) == 1, name


def test_there_are_at_least_300_cases_under_names_of_their_own() -> None:
    assert len(CASES) >= 300
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_planted_pickle_would_leave_its_mark(tmp_path: Path) -> None:
    pickle.loads(bomb(tmp_path))
    assert (tmp_path / MARKER).exists()


#: Nothing but admission runs in it, so that what grows and what is imported is admission's.
_ALL_AT_ONCE = """
import collections, json, re, sys
from pathlib import Path
from lora_hub_sdk.errors import AdmissionError
from lora_hub_sdk.registry.admission import admit
from lora_hub_sdk.registry.layout import BaseLayout

good, given = Path(sys.argv[1], "good"), json.loads(sys.argv[2])
layout = BaseLayout(**{**given, "others": frozenset(given["others"])})
# Not ru_maxrss: a child starts with its parent's.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
admit(good, source="good", layout=layout)
modules, before, found = set(sys.modules), peak(), collections.Counter()
for folder in good.parent.glob("case-*[0-9]"):
    try:
        admit(folder, source="mine", layout=layout)
        found["admitted"] += 1
    except AdmissionError:
        found["refused"] += 1
print(json.dumps([found, peak() - before, sorted(set(sys.modules) - modules), "torch" in sys.modules]))
"""


@pytest.mark.timeout(120)
@pytest.mark.skipif(sys.platform != "linux", reason="reads its peak of memory from /proc")
def test_all_of_them_in_one_process_take_little_memory_and_import_nothing(tmp_path: Path) -> None:
    write_good(tmp_path / "good")
    for number, case in enumerate(CASES):
        case.spoil(write_good(tmp_path / f"case-{number}"))
    command = [
        sys.executable,
        "-c",
        _ALL_AT_ONCE,
        str(tmp_path),
        json.dumps({**asdict(LAYOUT), "others": [*LAYOUT.others]}),
    ]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, grown, imported, torch = json.loads(done.stdout)
    assert sum(found.values()) == len(CASES)
    assert found["refused"] >= sum(case.error is not None for case in CASES)
    assert grown < 64 << 20
    assert (imported, torch) == ([], False)
    assert not list(tmp_path.glob(f"*/{MARKER}"))
