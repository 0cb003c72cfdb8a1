"""Keys take turns: one that asks for much does not hold another up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx

from lora_hub_sdk import EngineLimits, EngineSettings
from lora_hub_sdk.hub import LoraHub
from tests.encoders import Hashing
from tests.server.conftest import fill
from tests.server.serving import serving
from tests.support import endless_base


def test_a_key_with_many_requests_lets_another_one_in_between(tmp_path: Path) -> None:
    base = endless_base(tmp_path / "tiny")
    engines = EngineSettings(limits=EngineLimits(max_rows=1))
    ended: list[str] = []
    with LoraHub(tmp_path / "hub.db", encoder=Hashing("one"), offline=True, engines=engines) as hub:
        fill(hub, base, tmp_path)
        secrets = {name: hub.keys.create(name, namespace="default")[1] for name in ("busy", "other")}

        async def ask(client: httpx.AsyncClient, key: str, tokens: int) -> None:
            headers = {"authorization": f"Bearer {secrets[key]}"}
            body = {"model": "maths", "prompt": "What is 2 + 2?", "max_tokens": tokens}
            (await client.post("/v1/completions", json=body, headers=headers)).raise_for_status()
            ended.append(key)

        async def ask_all(url: str) -> None:
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                busy = [asyncio.create_task(ask(client, "busy", 100)) for _ in range(12)]
                while not hub.stats() or hub.stats()[0].waiting < 11:
                    await asyncio.sleep(0.005)
                await ask(client, "other", 1)
                await asyncio.gather(*busy)

        with serving(hub, auth="keys", base_model=str(base)) as served:
            asyncio.run(ask_all(served.url))
    assert ended.count("busy") == 12
    assert ended.index("other") < 6, "it came last, and would be answered last"
