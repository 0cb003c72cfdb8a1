"""A key sees its own namespace, and nothing of any other.

The proof is by two worlds: one server has the adapters of the team "alpha" alone, the other has those of a team "zebra"
too, with samples, tags, scores, rules and traffic. Whatever a key of "alpha" asks, by any route, field, header or path,
both answer the same, to the byte. What tells of the other team in any way would make them differ.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import httpx
import pytest

from lora_hub_sdk.errors import LoraHubError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.registry.api_keys import RIGHTS
from lora_hub_sdk.retriever.questions import Question
from lora_hub_sdk.testing import LocalHub, tiny_adapter, tiny_base
from lora_hub_sdk.types import Route, Routing
from tests.encoders import Hashing
from tests.server.serving import Served, serving

BASE: Final = "tiny/base"
OTHER_BASE: Final = "zebra/base"
#: What is only in the other namespace; every one of them holds "zebra".
NAME: Final = "zebra/stripes"
TEAM: Final = "zebra-team"
TAG: Final = "zebra-tag"
SAMPLE: Final = "How many stripes does a zebra have?"
#: A name that both have, for different adapters.
COMMON: Final = "common"
FOREIGN: Final = (
    NAME,
    "zebra/stripe",
    "Zebra/Stripes",
    f"{TEAM}/{NAME}",
    f"{TEAM}:{NAME}",
    TEAM,
    TAG,
    OTHER_BASE,
    SAMPLE,
)
PATHS: Final = (*FOREIGN, f"../{TEAM}/{NAME}", f"..%2f{TEAM}%2fzebra%2fstripes", COMMON, "own/dates", "")
HEADERS: Final = (
    {"x-namespace": TEAM},
    {"openai-organization": TEAM, "openai-project": TEAM},
    {"cookie": f"namespace={TEAM}"},
    {"x-forwarded-user": "zebra-key", "x-forwarded-host": TEAM},
)
#: What differs from one request to the next in one and the same world.
_VOLATILE: Final = (
    (re.compile(r"cmpl-[0-9a-f]{32}|call_[0-9a-f]{24}"), "(id)"),
    (re.compile(r'"created": ?\d+'), "(seconds)"),
    (re.compile(r"\d{4}-\d\d-\d\dT[0-9:.]+(\+00:00|Z)"), "(time)"),
)


@dataclass(frozen=True)
class Asked:
    """One request of a caller."""

    method: str
    path: str
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class World:
    """One server, and the keys of its callers by name."""

    hub: LoraHub
    served: Served
    keys: dict[str, str]

    @contextmanager
    def client(self, key: str | None) -> Iterator[httpx.Client]:
        headers = {} if key is None else {"authorization": f"Bearer {self.keys[key]}"}
        with httpx.Client(base_url=self.served.url, headers=headers, timeout=60) as client:
            yield client

    def answers(self, requests: list[Asked]) -> list[tuple[int, dict[str, str], str]]:
        """Status, headers and body of each, asked with the key of "alpha"."""
        with self.client("alpha") as client:
            return [_steady(_sent(client, asked)) for asked in requests]

    def operations(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Every operation of the server by method and path."""
        document = httpx.get(f"{self.served.url}/openapi.json").json()
        schemas = document["components"]["schemas"]
        found = {}
        for path, methods in document["paths"].items():
            for method, told in methods.items():
                content = told.get("requestBody", {}).get("content", {})
                reference = content.get("application/json", {}).get("schema", {}).get("$ref", "")
                schema = schemas.get(reference.rpartition("/")[2], {})
                found[method.upper(), path] = {**told, "fields": schema.get("properties", {})}
        return found


def _sent(client: httpx.Client, asked: Asked) -> httpx.Response:
    content = None if asked.body is None else json.dumps(asked.body)
    typed = {} if content is None else {"content-type": "application/json"}
    return client.request(asked.method, asked.path, content=content, headers={**typed, **asked.headers})


def _steady(answer: httpx.Response) -> tuple[int, dict[str, str], str]:
    text = answer.text
    for pattern, put in _VOLATILE:
        text = pattern.sub(put, text)
    headers = {name: value for name, value in answer.headers.items() if name not in ("date", "x-request-id")}
    if "(seconds)" in text or "(time)" in text:
        headers.pop("content-length", None)
    return answer.status_code, headers, text


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {BASE: tiny_base(folder / "one", chat=True), OTHER_BASE: tiny_base(folder / "two", seed=1, chat=True)}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path]) -> Iterator[LocalHub]:
    """A Hub with adapters of both teams, all public."""
    folder = tmp_path_factory.mktemp("adapters")
    with LocalHub() as hub:
        for seed, name in enumerate(("own/dates", "own/moods", "own/common", "zebra/common", NAME)):
            hub.publish(name, tiny_adapter(folder / str(seed), bases[BASE], seed=seed, base_name=BASE))
        other = tiny_adapter(folder / "other", bases[OTHER_BASE], seed=9, base_name=OTHER_BASE)
        hub.publish("zebra/elsewhere", other)
        yield hub


@contextmanager
def world(
    folder: Path, repositories: LocalHub, bases: dict[str, Path], *, crowded: bool, base_model: str | None
) -> Iterator[World]:
    with ExitStack() as stack:
        hub = stack.enter_context(
            LoraHub(
                folder / "hub.db",
                index="exact",
                encoder=Hashing("one"),
                endpoint=repositories.url,
                cache_dir=folder / "cache",
                base_folders=bases,
            )
        )
        if crowded:
            hub.register(NAME, samples=[SAMPLE, "Draw a zebra"], tags=[TAG], description="of a zebra", namespace=TEAM)
        hub.register("own/dates", samples=["3 May 1968"], tags=["own"], namespace="alpha")
        hub.register("own/common", name=COMMON, samples=["Common to alpha"], namespace="alpha")
        if crowded:
            hub.register(
                "zebra/common",
                name=COMMON,
                samples=["Common to a zebra", "Common in zebras"],
                tags=[TAG],
                namespace=TEAM,
            )
            hub.register("zebra/elsewhere", samples=["Where zebras live"], namespace=TEAM)
            hub.record_score(NAME, "zebras", "accuracy", 1.0, namespace=TEAM)
            hub.calibrate(namespace=TEAM)
            hub.fit_weights(namespace=TEAM, k=2)
        keys = {"alpha": hub.keys.create("alpha", namespace="alpha", rights=RIGHTS)[1]}
        if crowded:
            keys["zebra"] = hub.keys.create("zebra-key", namespace=TEAM, rights=RIGHTS)[1]
        served = stack.enter_context(serving(hub, base_model=base_model, auth="keys", new_tokens=2))
        made = World(hub, served, keys)
        if crowded:
            with made.client("zebra") as client:
                answer = client.post("/v1/completions", json={"prompt": [SAMPLE, "Where zebras live"], "max_tokens": 2})
                assert answer.status_code == 200, answer.text
                assert "zebra" in answer.text
        yield made


@dataclass(frozen=True)
class Worlds:
    """The same server without and with another team."""

    alone: World
    crowded: World


@pytest.fixture(scope="module", params=[BASE, None], ids=["one base", "any base"])
def worlds(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    repositories: LocalHub,
    bases: dict[str, Path],
) -> Iterator[Worlds]:
    with ExitStack() as stack:

        def opened(crowded: bool) -> World:
            folder = tmp_path_factory.mktemp("world")
            return stack.enter_context(world(folder, repositories, bases, crowded=crowded, base_model=request.param))

        yield Worlds(opened(False), opened(True))


def test_the_other_team_is_there_for_its_own_key(worlds: Worlds) -> None:
    """Else the proof below would prove nothing."""
    with worlds.crowded.client("zebra") as client:
        assert NAME in client.get("/v1/adapters").text
        assert NAME in client.get("/v1/models").text
        assert client.get(f"/v1/adapters/{NAME}").json()["examples"] == [SAMPLE, "Draw a zebra"]
        (first, *_) = client.post("/v1/adapters/search", json={"query": SAMPLE}).json()["data"]
        assert first["adapter"]["name"] == NAME
        answer = client.post("/v1/completions", json={"model": NAME, "prompt": "a", "max_tokens": 1})
        assert answer.json()["route"]["adapters"][0]["name"] == NAME
        assert client.get("/v1/adapters/own/dates").status_code == 404


#: A body of each route that is answered, and the least work.
_BODIES: Final[dict[str, dict[str, Any]]] = {
    "/v1/completions": {"model": "auto", "prompt": SAMPLE, "max_tokens": 1},
    "/v1/chat/completions": {"model": "auto", "messages": [{"role": "user", "content": SAMPLE}], "max_tokens": 1},
    "/v1/adapters/search": {"query": SAMPLE},
    "/v1/adapters": {"repo_id": "own/dates", "samples": ["3 May 1968"], "base_model": BASE},
}
#: Fields that there are not, but that somebody may have thought of.
_GUESSED: Final = ("namespace", "team", "base_model", "adapter", "lora", "extra_body", "api_key", "min_trust")
#: Right requests about the other team, and those in which several fields play together.
_SPECIAL: Final = (
    ("/v1/completions", {"adapters": [COMMON]}),
    ("/v1/completions", {"adapters": ["own/dates", NAME]}),
    ("/v1/completions", {"exclude": ["own/dates", COMMON]}),
    ("/v1/completions", {"tags": [TAG]}),
    ("/v1/completions", {"tags": ["own"], "exclude": ["own/dates"]}),
    ("/v1/completions", {"min_score": "auto"}),
    ("/v1/completions", {"weights": "fitted"}),
    ("/v1/completions", {"model": "auto:sparse"}),
    ("/v1/completions", {"model": "auto:ramole"}),
    ("/v1/completions", {"model": "auto:selection", "k": 9, "rerank": True}),
    ("/v1/completions", {"model": "auto", "k": 9, "rerank": False, "stream": True}),
    ("/v1/completions", {"model": NAME, "stream": True}),
    ("/v1/completions", {"model": COMMON}),
    ("/v1/completions", {"model": "base"}),
    ("/v1/completions", {"prompt": [SAMPLE, "Common to a zebra", "Where zebras live"]}),
    ("/v1/chat/completions", {"model": NAME, "stream": True}),
    ("/v1/chat/completions", {"stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", {"template": "alpaca", "model": NAME}),
    ("/v1/adapters/search", {"k": 100}),
    ("/v1/adapters/search", {"k": 100, "tags": [TAG]}),
    ("/v1/adapters/search", {"k": 100, "exclude": [NAME, COMMON]}),
    ("/v1/adapters/search", {"k": 100, "query": "Common to a zebra", "rerank": True}),
)


def _requests(operations: dict[tuple[str, str], dict[str, Any]]) -> list[Asked]:
    """Every operation with what names the other team in every place that can be named."""
    made: list[Asked] = []
    for (method, path), told in operations.items():
        names = () if "{" not in path else FOREIGN if method == "DELETE" else PATHS
        places = [re.sub(r"\{[^}]*\}", quote(name, safe="/%"), path) for name in names] or [path]
        queries = [one["name"] for one in told.get("parameters", []) if one["in"] == "query"]
        body = _BODIES[path] if method == "POST" else None
        made += [Asked(method, place, body) for place in places]
        made += [Asked(method, places[0], body, headers) for headers in HEADERS]
        made += [
            Asked(method, f"{places[0]}?{name}={quote(value, safe='')}", body)
            for name in (*queries, "namespace")
            for value in (TEAM, NAME)
        ]
        if method == "POST":
            for name in (*told["fields"], *_GUESSED):
                values: tuple[Any, ...] = (NAME, TEAM, [NAME], {"name": NAME})
                made += [Asked(method, path, {**_BODIES[path], name: value}) for value in values]
    made += [Asked("POST", path, {**_BODIES[path], **fields}) for path, fields in _SPECIAL]
    # A name is free where only others have it, and what is done to it is done to one's own.
    own = {"repo_id": "own/moods", "samples": ["I am happy"], "base_model": BASE}
    for name in (NAME, COMMON, "own/moods"):
        made += [
            Asked("POST", "/v1/adapters", {**own, "name": name}),
            Asked("GET", f"/v1/adapters/{name}"),
            Asked("GET", "/v1/adapters"),
            Asked("POST", "/v1/completions", {**_BODIES["/v1/completions"], "model": name}),
            Asked("DELETE", f"/v1/adapters/{name}"),
            Asked("DELETE", f"/v1/adapters/{name}"),
        ]
    back = {"repo_id": "own/common", "name": COMMON, "samples": ["Common to alpha"], "base_model": BASE}
    return [*made, Asked("POST", "/v1/adapters", back), Asked("GET", "/v1/adapters")]


#: It counts what all callers ask together, and is for whoever runs the server.
_COMMON: Final = ("GET", "/metrics")


def test_what_a_key_is_answered_does_not_depend_on_other_namespaces(worlds: Worlds) -> None:
    operations = worlds.alone.operations()
    assert operations.pop(_COMMON)
    assert {path for method, path in operations if method == "POST"} == set(_BODIES)
    assert operations.keys() >= {("GET", "/v1/models"), ("GET", "/v1/adapters"), ("DELETE", "/v1/adapters/{name}")}
    before = worlds.crowded.hub.list(namespace=TEAM)
    requests = _requests(operations)
    alone, crowded = worlds.alone.answers(requests), worlds.crowded.answers(requests)
    answered = 0
    for asked, one, other in zip(requests, alone, crowded, strict=True):
        assert one == other, asked
        assert one[0] < 500, (asked, one)
        answered += one[0] < 300
    assert answered > 100  # not only refusals were compared
    assert worlds.crowded.hub.list(namespace=TEAM) == before


#: What a program in front of the hub may pass on of a caller, who is held to one namespace.
_CALLS: Final[tuple[Callable[[LoraHub, str], object], ...]] = (
    lambda hub, text: hub.get(text, namespace="alpha"),
    lambda hub, text: hub.samples(text, namespace="alpha"),
    lambda hub, text: hub.scores(text, namespace="alpha"),
    lambda hub, text: hub.pin(text, namespace="alpha"),
    lambda hub, text: hub.retire(text, namespace="alpha"),
    lambda hub, text: hub.update(text, namespace="alpha"),
    lambda hub, text: hub.remove(text, namespace="alpha"),
    lambda hub, text: hub.record_score(text, "a", "b", 1, namespace="alpha"),
    lambda hub, text: [one.name for one in hub.list(namespace="alpha", base_model=text)],
    lambda hub, text: hub.base_models("alpha"),
    lambda hub, text: [(hit.adapter.name, hit.score) for hit in hub.search(text, 99, namespace="alpha")],
    lambda hub, text: hub.search(text, namespace="alpha", base_model=OTHER_BASE),
    lambda hub, text: hub.search(text, namespace="alpha", tags=[text]),
    lambda hub, text: hub.search(text, namespace="nobody"),
    lambda hub, text: hub.route([text], routing=Routing(namespace="alpha", adapters=(text,))),
    lambda hub, text: hub.route([text], routing=Routing(namespace="alpha", adapters=("own/dates", text))),
    lambda hub, text: hub.route([text], routing=Routing(namespace="alpha", tags=(text,))),
    lambda hub, text: hub.route([text], routing=Routing(namespace="alpha", bases=(OTHER_BASE,))),
    lambda hub, text: hub.route([text], routing=Routing(namespace="alpha", exclude=(text, "own/dates", COMMON))),
    lambda hub, text: hub.route([text], routing=Routing(namespace="alpha", min_score="auto")),
    lambda hub, text: hub.route([text], routing=Routing(namespace="alpha", weights="fitted")),
    lambda hub, text: hub.route([text], routing=Routing(namespace="nobody")),
    lambda hub, text: hub.route([text], base_model=OTHER_BASE, routing=Routing(namespace="alpha")),
    lambda hub, text: hub.route([text], routing=Routing(namespace="alpha", k=9)),
    lambda hub, text: hub.export({text: 1.0}, "nowhere", namespace="alpha"),
    lambda hub, text: [event.name for event in hub.events(text, namespace="alpha")],
    lambda hub, text: hub.fit_weights(namespace="alpha", questions=[Question(text, text)]),
    lambda hub, text: hub.calibrate(namespace="alpha", trained=[text]),
)


def test_the_hubs_own_answers_and_errors_do_not_depend_on_other_namespaces(worlds: Worlds) -> None:
    def told(hub: LoraHub, call: Callable[[LoraHub, str], object], text: str) -> str:
        try:
            found = call(hub, text)
        except LoraHubError as error:
            return f"{type(error).__name__}: {error} {sorted(vars(error).items(), key=str)}"
        rows = found if isinstance(found, list) else [found]
        return repr([row.as_dict() if isinstance(row, Route) else row for row in rows])

    for number, call in enumerate(_CALLS):
        for text in FOREIGN:
            assert told(worlds.alone.hub, call, text) == told(worlds.crowded.hub, call, text), (number, text)


def test_the_page_of_metrics_names_no_adapter_and_no_namespace(worlds: Worlds) -> None:
    with worlds.crowded.client("alpha") as client:
        for path in (f"/v1/adapters/{NAME}", f"/v1/models/{NAME}", f"/{TEAM}"):
            client.get(path)
        page = client.get("/metrics").text
    assert "lora_hub_http_requests_total" in page
    for told in (NAME, "zebra-", "own/dates", COMMON, "alpha"):
        assert told not in page


def test_without_a_key_or_the_right_every_route_is_shut_alike(worlds: Worlds) -> None:
    hub, operations = worlds.crowded.hub, worlds.crowded.operations()
    free = {("GET", "/health"), ("GET", "/ready")}
    assert operations.keys() >= free
    name = f"none {len(hub.keys.list())}"
    worlds.crowded.keys["weak"] = hub.keys.create(name, namespace="alpha", rights=["generate"])[1]
    worlds.crowded.keys["gone"] = hub.keys.create(f"{name} gone", namespace="alpha")[1]
    hub.keys.revoke(f"{name} gone")
    for key, statuses in ((None, {401}), ("gone", {401}), ("weak", {403, 200})):
        with worlds.crowded.client(key) as client:
            for (method, path), told in operations.items():
                place = re.sub(r"\{[^}]*\}", NAME, path)
                answer = _sent(client, Asked(method, place, _BODIES[path] if method == "POST" else None))
                if (method, path) in free:
                    assert answer.status_code == 200
                    assert "zebra" not in answer.text
                    continue
                assert answer.status_code in statuses, (key, told, answer.text)
                assert (answer.status_code == 200) == (key == "weak" and "completions" in path)
                if answer.status_code != 200:
                    assert "zebra" not in answer.text
                    assert answer.json()["error"]["message"]


def test_callers_of_two_namespaces_who_ask_the_same_at_once_each_get_their_own(worlds: Worlds) -> None:
    world = worlds.crowded

    async def ask(client: httpx.AsyncClient, key: str, number: int) -> tuple[str, list[str]]:
        body = {"model": "auto:selection", "prompt": [SAMPLE, "3 May 1968"][number % 2], "max_tokens": 2, "k": 1}
        headers = {"authorization": f"Bearer {world.keys[key]}"}
        answer = await client.post("/v1/completions", json=body, headers=headers)
        return key, [one["name"] for one in answer.json()["route"]["adapters"]]

    async def all_at_once() -> list[tuple[str, list[str]]]:
        async with httpx.AsyncClient(base_url=world.served.url, timeout=60) as client:
            return await asyncio.gather(
                *(ask(client, key, number) for number in range(16) for key in ("alpha", "zebra"))
            )

    own = {
        key: {one.name for one in world.hub.list(namespace=namespace)}
        for key, namespace in (("alpha", "alpha"), ("zebra", TEAM))
    }
    found = asyncio.run(all_at_once())
    assert len(found) == 32
    for key, names in found:
        assert names
        assert set(names) <= own[key]
    assert {name for key, names in found if key == "zebra" for name in names} >= {NAME}
