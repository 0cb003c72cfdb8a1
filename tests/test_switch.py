"""Another encoder in a registry in use: every search is of one space, every process follows, nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from lora_hub_sdk.errors import (
    AdapterNotFoundError,
    ConfigurationError,
    EncoderMismatchError,
    ModelNotFoundError,
    NoAdaptersError,
    SamplesError,
)
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.registry.store import SqlStore
from lora_hub_sdk.retriever.encoder import Encoder, SentenceEncoder, mean_vector
from lora_hub_sdk.testing import tiny_adapter, tiny_encoder
from lora_hub_sdk.types import Adapter, Routing
from tests.encoders import Hashing
from tests.registry.worker import forking

SAMPLES: Final = {
    "dates": ("Write 3 May 1968 as ISO", "Which day is 2001-06-01?"),
    "sums": ("What is 12 + 30?", "Add 4 and 9."),
    "moods": ("I loved it. Positive or negative?", "The food was awful: how does that sound?"),
    "french": ("Say 'good morning' in French", "Translate: thank you"),
}
PROMPTS: Final = ["Add 5 to 6", "In French: the bread", "Is 'never again' a good review?", "3 June 1999, please"]
Open = Callable[..., LoraHub]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two encoders that any process can load."""
    first, second = (tiny_encoder(tmp_path_factory.mktemp("encoders") / f"of-{seed}", seed=seed) for seed in (1, 2))
    return first, second


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: tiny_adapter(folder / name, base, seed=seed) for seed, name in enumerate([*SAMPLES, "late"])}


@pytest.fixture
def open_one(open_hub: Open) -> Open:
    """Opens hubs on one registry that follow its encoder, unless they are given one."""
    return lambda **options: open_hub(**{"encoder": None, "index": "exact", "offline": True, **options})


@pytest.fixture
def filled(open_one: Open, folders: tuple[Path, Path], adapters: dict[str, Path]) -> LoraHub:
    """A hub that follows; its registry has four adapters under the first encoder."""
    with open_one(encoder=folders[0]) as hub:
        for name, samples in SAMPLES.items():
            hub.register(adapters[name], samples=samples)
    return open_one()


def space(
    encoder: Path | Encoder, samples: dict[str, tuple[str, ...]] | None = None
) -> Callable[[str], list[tuple[str, float]]]:
    """Brute force under one encoder: names with their cosines, best first."""
    if isinstance(encoder, Path):
        encoder = SentenceEncoder(resolve_model(encoder))
    known = SAMPLES if samples is None else samples
    means = {name: mean_vector(encoder.encode(texts)) for name, texts in known.items()}

    def ask(prompt: str) -> list[tuple[str, float]]:
        (vector,) = encoder.encode([prompt])
        return sorted(((name, float(mean @ vector)) for name, mean in means.items()), key=lambda pair: -pair[1])

    return ask


def found(hub: LoraHub, prompt: str) -> list[tuple[str, float]]:
    return [(hit.adapter.name, hit.score) for hit in hub.search(prompt, k=9)]


def is_from(answer: list[tuple[str, float]], expected: list[tuple[str, float]]) -> bool:
    names = [name for name, _ in answer] == [name for name, _ in expected]
    return names and np.allclose([score for _, score in answer], [score for _, score in expected], atol=1e-4)


def follows(hub: LoraHub, encoder: Path | Encoder, samples: dict[str, tuple[str, ...]] | None = None) -> bool:
    expected = space(encoder, samples)
    return all(is_from(found(hub, prompt), expected(prompt)) for prompt in PROMPTS)


# -- which encoder a hub has -------------------------------------------------------------------------------------------


def test_a_new_registry_takes_the_embedded_encoder_and_records_it(
    open_one: Open, encoder: SentenceEncoder, adapters: dict[str, Path]
) -> None:
    hub = open_one()
    assert hub.encoder.fingerprint == encoder.fingerprint
    assert hub._registry.store.active_encoder() is None
    hub.register(adapters["sums"], samples=SAMPLES["sums"])
    record = hub._registry.store.active_encoder()
    assert record is not None
    assert (record.fingerprint, record.reference) == (encoder.fingerprint, encoder.name)
    assert open_one().search(PROMPTS[0])[0].adapter.name == "sums"


def test_a_hub_without_an_encoder_takes_the_one_that_registered_first(
    filled: LoraHub, folders: tuple[Path, Path]
) -> None:
    assert filled.encoder.name == str(folders[0])
    assert follows(filled, folders[0])


def test_an_instruction_alone_goes_with_the_embedded_encoder(open_one: Open, encoder: SentenceEncoder) -> None:
    asked = open_one(instruction="Find: ").encoder
    assert (asked.name, asked.fingerprint == encoder.fingerprint) == (encoder.name, False)


def test_an_object_for_an_encoder_is_asked_for_by_name(open_one: Open, adapters: dict[str, Path]) -> None:
    own = open_one(encoder=Hashing("mine"))
    own.register(adapters["sums"], samples=SAMPLES["sums"])
    with pytest.raises(EncoderMismatchError, match=r"'mine'.*encoder=\.\.\."):
        open_one().search("anything")
    assert [hit.adapter.name for hit in open_one(encoder=Hashing("mine")).search("anything")] == ["sums"]


def test_a_folder_whose_files_changed_is_not_taken_for_the_encoder_it_was(
    open_one: Open, folders: tuple[Path, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    own = shutil.copytree(folders[0], tmp_path / "own")
    open_one(encoder=own).register(adapters["sums"], samples=SAMPLES["sums"])
    shutil.copy(folders[1] / "model.safetensors", own / "model.safetensors")
    hub = open_one()
    with pytest.raises(EncoderMismatchError, match=str(own)):
        hub.search("anything")
    shutil.rmtree(own)
    with pytest.raises(ModelNotFoundError, match="switch_encoder"):
        hub.search("anything")
    assert hub.switch_encoder(folders[1]) == 1
    assert follows(hub, folders[1], {"sums": SAMPLES["sums"]})


def test_a_hub_with_its_own_encoder_keeps_it_and_registers_nothing_under_it(
    filled: LoraHub, open_one: Open, folders: tuple[Path, Path], adapters: dict[str, Path]
) -> None:
    own = open_one(encoder=folders[0])
    filled.switch_encoder(folders[1])
    assert follows(own, folders[0])
    assert follows(filled, folders[1])
    with pytest.raises(EncoderMismatchError, match="switch_encoder"):
        own.register(adapters["late"], samples=["Late"])
    with pytest.raises(EncoderMismatchError, match="switch_encoder"):
        own.update("sums", samples=["Late"])
    assert [adapter.name for adapter in filled.list()] == sorted(SAMPLES)
    assert filled.samples("sums") == SAMPLES["sums"]


# -- switching ---------------------------------------------------------------------------------------------------------


def test_switching_embeds_all_and_switching_back_nothing(filled: LoraHub, folders: tuple[Path, Path]) -> None:
    first, second = folders
    filled.retire("moods")
    moved: list[tuple[int, int]] = []
    digests = [filled.digest]
    assert filled.switch_encoder(second, progress=lambda done, total: moved.append((done, total))) == 4
    assert moved == [(1, 4), (2, 4), (3, 4), (4, 4)]
    digests.append(filled.digest)
    filled.restore("moods")
    assert follows(filled, second)
    assert filled.verify().agrees
    for folder in (first, second, first):
        assert filled.switch_encoder(folder) == 0
        assert follows(filled, folder)
        digests.append(filled.digest)
    assert len(set(digests)) == len(digests)
    assert [event.detail["encoder"] for event in filled.events() if event.action == "switched"] == [
        SentenceEncoder(resolve_model(folder)).fingerprint for folder in (first, second, first, second)
    ]
    before = filled.digest
    assert filled.switch_encoder(first) == 0
    assert filled.digest == before


def test_another_instruction_is_another_encoder(filled: LoraHub, open_one: Open, folders: tuple[Path, Path]) -> None:
    other = open_one()
    assert filled.switch_encoder(folders[0], instruction="Find: ") == 4
    expected = SentenceEncoder(resolve_model(folders[0]), instruction="Find: ")
    assert follows(filled, expected)
    assert follows(other, expected)
    with pytest.raises(ConfigurationError, match="instruction"):
        filled.switch_encoder(Hashing("mine"), instruction="Find: ")


def test_searches_through_switches_are_never_of_two_spaces(
    filled: LoraHub, open_one: Open, folders: tuple[Path, Path]
) -> None:
    spaces = [space(folder) for folder in folders]
    expected = {prompt: [ask(prompt) for ask in spaces] for prompt in PROMPTS}
    stop, other = threading.Event(), open_one()

    def go_on(number: int) -> list[tuple[int, ...]]:
        hub = (filled, other)[number % 2]
        seen: list[tuple[int, ...]] = []
        while not stop.is_set():
            prompt = PROMPTS[len(seen) % len(PROMPTS)]
            answer = found(hub, prompt)
            seen.append(tuple(place for place in (0, 1) if is_from(answer, expected[prompt][place])))
        return seen

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(go_on, number) for number in range(4)]
        try:
            for turn in range(8):
                filled.switch_encoder(folders[(turn + 1) % 2])
                # Both hubs have answered in this space before the next switch.
                assert all(
                    is_from(found(hub, PROMPTS[0]), expected[PROMPTS[0]][(turn + 1) % 2]) for hub in (filled, other)
                )
        finally:
            stop.set()
        seen = [each for done in running for each in done.result()]
    assert set(seen) == {(0,), (1,)}, seen


def test_a_search_that_began_before_the_switch_ends_in_the_space_it_began_in(
    filled: LoraHub, open_one: Open, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = open_one()
    expected = [space(folder)(PROMPTS[0]) for folder in folders]
    real = Registry.search

    def late(self: Registry, *args: Any) -> Any:
        monkeypatch.setattr(Registry, "search", real)
        other.switch_encoder(folders[1])
        return real(self, *args)

    filled.search("anything")
    monkeypatch.setattr(Registry, "search", late)
    assert is_from(found(filled, PROMPTS[0]), expected[0])
    assert is_from(found(filled, PROMPTS[0]), expected[1])


def test_a_search_begins_anew_where_the_old_space_lacks_what_came_since(
    filled: LoraHub, open_one: Open, folders: tuple[Path, Path], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, real = open_one(), Registry.search

    def late(self: Registry, *args: Any) -> Any:
        monkeypatch.setattr(Registry, "search", real)
        other.switch_encoder(folders[1])
        other.update("sums", samples=["Now something else"])
        return real(self, *args)

    monkeypatch.setattr(Registry, "search", late)
    (route,) = filled.route([PROMPTS[0]], base_model=base, routing=Routing(k=4))
    expected = space(folders[1], {**SAMPLES, "sums": ("Now something else",)})(PROMPTS[0])
    assert [member.adapter.name for member in route.members] == [name for name, _ in expected]


def test_another_process_follows_with_its_next_search(
    filled: LoraHub, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    program = (
        "import json, sys\nfrom lora_hub_sdk.hub import LoraHub\n"
        "with LoraHub(sys.argv[1], index='exact', offline=True) as hub:\n"
        "    for line in sys.stdin:\n"
        "        rows = hub.search_many(json.loads(line), k=9)\n"
        "        hits = [[(hit.adapter.name, hit.score) for hit in row] for row in rows]\n"
        "        print(json.dumps([hub.digest, hits]), flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "hub.db")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        digests = []
        for folder in (folders[0], folders[1], folders[0]):
            filled.switch_encoder(folder)
            process.stdin.write(f"{json.dumps(PROMPTS)}\n")
            process.stdin.flush()
            digest, rows = json.loads(process.stdout.readline())
            expected = space(folder)
            for prompt, row in zip(PROMPTS, rows, strict=True):
                assert is_from([(name, score) for name, score in row], expected(prompt)), (folder, prompt, row)
            assert digest == filled.digest
            digests.append(digest)
        process.stdin.close()
    assert len(set(digests)) == 3


# -- killed, and gone on with ------------------------------------------------------------------------------------------


def switch_and_die(database: str, folder: Path, method: str, count: int) -> None:
    """Switch, and be killed when a method of the store is called for the ``count``-th time."""
    real, calls = getattr(SqlStore, method), []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(method)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    setattr(SqlStore, method, counted)
    with LoraHub(database, index="exact", offline=True) as hub:
        hub.switch_encoder(folder)


@pytest.mark.parametrize(("method", "count", "left"), [("add_embedding", 3, 2), ("activate", 1, 0)])
def test_a_switch_that_was_killed_goes_on_where_it_was(
    filled: LoraHub, folders: tuple[Path, Path], tmp_path: Path, method: str, count: int, left: int
) -> None:
    arguments = (str(tmp_path / "hub.db"), folders[1], method, count)
    process = forking().Process(target=switch_and_die, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert follows(filled, folders[0])
    assert filled.verify().agrees
    assert filled.switch_encoder(folders[1]) == left
    assert follows(filled, folders[1])


# -- while others write ------------------------------------------------------------------------------------------------


def test_what_others_register_meanwhile_is_embedded_before_the_switch(
    filled: LoraHub, open_one: Open, folders: tuple[Path, Path], adapters: dict[str, Path]
) -> None:
    other = open_one()
    moved: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        moved.append((done, total))
        if done == 4:  # all that there were
            other.register(adapters["late"], samples=["Come late"])

    assert filled.switch_encoder(folders[1], progress=progress) == 5
    assert moved[-1] == (5, 5)
    known = {**SAMPLES, "late": ("Come late",)}
    assert follows(filled, folders[1], known)
    assert follows(other, folders[1], known)


def test_samples_that_are_replaced_while_they_are_embedded_leave_no_vector_of_the_old_ones(
    filled: LoraHub, open_one: Open
) -> None:
    other = open_one()
    changed: list[Adapter] = []

    def meanwhile(texts: Sequence[str]) -> None:
        if tuple(texts) == SAMPLES["sums"] and not changed:
            changed.append(other.update("sums", samples=["Now something else"]))

    new = Hashing("new", meanwhile)
    assert filled.switch_encoder(new) == 4
    assert changed
    assert follows(filled, Hashing("new"), {**SAMPLES, "sums": ("Now something else",)})


def test_an_adapter_that_is_removed_while_it_is_embedded_is_no_obstacle(filled: LoraHub, open_one: Open) -> None:
    other = open_one()

    def meanwhile(texts: Sequence[str]) -> None:
        if tuple(texts) == SAMPLES["sums"]:
            other.remove("sums")

    assert filled.switch_encoder(Hashing("new", meanwhile)) == 3
    assert follows(filled, Hashing("new"), {name: SAMPLES[name] for name in SAMPLES if name != "sums"})


@pytest.mark.parametrize("call", ["register", "update"])
def test_what_was_embedded_before_a_switch_is_embedded_again_after_it(
    filled: LoraHub,
    open_one: Open,
    folders: tuple[Path, Path],
    adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    call: str,
) -> None:
    other, method = open_one(), {"register": "add", "update": "replace"}[call]
    real, tries = getattr(SqlStore, method), []

    def late(*args: Any) -> Any:
        tries.append(call)
        if len(tries) == 1:  # checked and embedded; only its transaction is to come
            other.switch_encoder(folders[1])
        return real(*args)

    monkeypatch.setattr(SqlStore, method, late)
    if call == "register":
        filled.register(adapters["late"], samples=["Come late"])
        known = {**SAMPLES, "late": ("Come late",)}
    else:
        filled.update("sums", samples=["Come late"])
        known = {**SAMPLES, "sums": ("Come late",)}
    assert len(tries) == 2
    assert follows(filled, folders[1], known)
    assert follows(other, folders[1], known)


def test_an_owners_vector_is_never_taken_for_one_of_the_new_encoder(
    filled: LoraHub,
    open_one: Open,
    folders: tuple[Path, Path],
    adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other, real = open_one(), SqlStore.add

    def late(*args: Any) -> Any:
        other.switch_encoder(folders[1])
        return real(*args)

    monkeypatch.setattr(SqlStore, "add", late)
    vector = filled.encoder.encode(["Secret"])[0]
    with pytest.raises(EncoderMismatchError, match="nothing was written"):
        filled.register(adapters["late"], embedding=vector)
    assert [adapter.name for adapter in filled.list()] == sorted(SAMPLES)


def test_registrations_from_threads_all_through_switches_leave_every_adapter_findable(
    filled: LoraHub, open_one: Open, folders: tuple[Path, Path], adapters: dict[str, Path]
) -> None:
    hubs, turns = [open_one(), open_one()], 6

    def add(number: int) -> None:
        hubs[number % 2].register(adapters["late"], name=f"late-{number}", samples=[f"Come late, {number}"])

    with ThreadPoolExecutor(2) as pool:
        for turn in range(turns):
            running = [pool.submit(add, 2 * turn + number) for number in range(2)]
            filled.switch_encoder(folders[(turn + 1) % 2])
            for done in running:
                done.result()
    known = {**SAMPLES, **{f"late-{number}": (f"Come late, {number}",) for number in range(2 * turns)}}
    expected = space(folders[turns % 2], known)
    for hub in (filled, *hubs):
        for prompt in PROMPTS:
            answer = [(hit.adapter.name, hit.score) for hit in hub.search(prompt, k=99)]
            assert is_from(answer, expected(prompt)), (prompt, answer)
        assert hub.verify().agrees


# -- what cannot be embedded again -------------------------------------------------------------------------------------


@pytest.fixture
def private(filled: LoraHub, adapters: dict[str, Path]) -> LoraHub:
    """Four adapters with samples, one whose owner gave a vector, and one whose samples were dropped."""
    vector: NDArray[np.float32] = filled.encoder.encode(["Secret"])[0]
    filled.register(adapters["late"], name="secret", embedding=vector, namespace="team")
    filled.register(adapters["late"], name="dropped", samples=["Drop me"], keep_samples=False)
    return filled


def test_adapters_that_would_be_lost_are_named_before_anything_is_embedded(
    private: LoraHub, folders: tuple[Path, Path]
) -> None:
    new, before = Hashing("new"), private.digest
    private.retire("dropped")
    with pytest.raises(
        EncoderMismatchError, match=r"2 adapters .*dropped, team/secret|team/secret, dropped"
    ) as refusal:
        private.switch_encoder(new)
    assert "hub.update(name, samples=...)" in str(refusal.value)
    assert new.texts == []
    private.restore("dropped")
    assert private.digest != before
    assert private.encoder.name == str(folders[0])
    assert len(private.search(PROMPTS[0], k=9)) == 5


def test_owners_can_give_their_vectors_under_the_new_encoder(private: LoraHub) -> None:
    new = Hashing("new")
    vectors = {("default", "dropped"): new.encode(["Drop me"])[0], ("team", "secret"): new.encode(["Secret"])[0] * 3}
    assert private.switch_encoder(new, embeddings=vectors) == 6
    assert follows(private, new, {**SAMPLES, "dropped": ("Drop me",)})
    (hit,) = private.search("Secret", namespace="team")
    assert hit.adapter.name == "secret"
    assert hit.score == pytest.approx(1.0, abs=1e-5)
    assert private.switch_encoder(new, embeddings=vectors) == 0


def test_vectors_that_cannot_be_used_are_refused_before_anything_is_written(private: LoraHub) -> None:
    new, version = Hashing("new"), private._registry.store.version()
    dropped = np.ones(new.dimension)
    for embeddings, error in (
        ({"dropped": np.ones(3)}, SamplesError),
        ({"dropped": dropped}, EncoderMismatchError),  # one is missing still
        ({"nobody": dropped}, AdapterNotFoundError),
        ({"sums": dropped}, ConfigurationError),
    ):
        with pytest.raises(error):
            private.switch_encoder(new, embeddings=embeddings)
    assert private._registry.store.version() == version


def test_new_samples_or_no_adapter_let_the_switch_go_on(private: LoraHub, folders: tuple[Path, Path]) -> None:
    private.update("dropped", samples=["Keep me"])
    private.remove("secret", namespace="team")
    assert private.switch_encoder(folders[1]) == 5
    assert follows(private, folders[1], {**SAMPLES, "dropped": ("Keep me",)})


def test_a_guess_is_made_again_from_the_others_new_vectors(
    open_one: Open, folders: tuple[Path, Path], adapters: dict[str, Path]
) -> None:
    hub = open_one(encoder=folders[0])
    hub.register(adapters["late"], name="guess", description="Adds numbers")  # before all that it goes by
    for name, samples in SAMPLES.items():
        hub.register(adapters[name], samples=samples)
    assert hub.switch_encoder(folders[1]) == 5
    assert hub.verify().unembedded == ()
    again, own = hub._registry.vector(hub.get("guess")), hub.encoder.encode(["guess\nAdds numbers"])[0]
    assert again is not None
    assert not np.allclose(again, own, atol=1e-3), "guessed while no other adapter had its vector"


def test_a_registry_without_adapters_is_switched_at_once(
    open_one: Open, folders: tuple[Path, Path], base: Path
) -> None:
    hub = open_one()
    assert hub.switch_encoder(folders[1]) == 0
    assert open_one().encoder.name == str(folders[1])
    with pytest.raises(NoAdaptersError):
        hub.route(["anything"], base_model=base)
