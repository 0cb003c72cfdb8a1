"""``lora-hub serve`` as a process of its own, and what it refuses to start."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from lora_hub_sdk.cli import app
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.testing.tiny import tiny_encoder


def test_what_cannot_be_served_is_told_without_a_traceback(tmp_path: Path) -> None:
    database = str(tmp_path / "hub.db")
    for arguments, told in (
        (["--auth", "none", "--host", "0.0.0.0"], "keys"),
        (["--strategy", "luck"], "luck"),
        (["--timeout", "0"], "timeout_s"),
        ([], "does not exist"),
    ):
        result = CliRunner().invoke(app, ["serve", *arguments, "--database", database])
        assert result.exit_code == 1, result.output
        assert told in result.output
        assert "Traceback" not in result.output


@pytest.mark.slow
def test_a_served_hub_asks_for_keys_and_ends_well_when_it_is_told_to(tmp_path: Path, base: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder")
    with LoraHub(tmp_path / "hub.db", encoder=encoder, offline=True) as hub:
        hub.register(tiny_adapter(tmp_path / "maths", base), samples=["What is 12 + 30?"])
        _, secret = hub.keys.create("laptop", namespace="default")
    command = [sys.executable, "-c", "from lora_hub_sdk.cli import main; main()", "serve", "--port", "0", "--offline"]
    command += ["--database", str(tmp_path / "hub.db"), "--base-model", str(base), "--index", "exact"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            url = next(found[1] for line in lines if (found := re.search(r"running on (http://\S+)", line)))
            body = {"model": "auto", "prompt": "What is 12 + 30?", "max_tokens": 100, "stream": True}
            assert httpx.post(f"{url}/v1/completions", json=body).status_code == 401
            header = {"authorization": f"Bearer {secret}"}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=header, timeout=60) as answer:
                rows = answer.iter_lines()
                assert json.loads(next(rows).removeprefix("data: "))["choices"]
                process.send_signal(signal.SIGTERM)
                assert [row for row in rows if row][-1] == "data: [DONE]"
            assert process.wait(60) == 0
            assert "Traceback" not in "".join(lines)
        finally:
            process.kill()
