"""``register`` and ``update``: how adapters come into the registry, and how they move to another revision."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from lora_hub_sdk.cli.adapters import adapter_data
from lora_hub_sdk.cli.batch import read_lines, register_lines
from lora_hub_sdk.cli.command import Outcome, command
from lora_hub_sdk.cli.opening import open_hub, quiet_libraries
from lora_hub_sdk.cli.options import (
    Actor,
    AdapterName,
    AsJson,
    Database,
    DropSamples,
    Endpoint,
    Namespace,
    Offline,
    OwnBase,
    Revision,
    SamplesFile,
)
from lora_hub_sdk.types import DEFAULT_NAMESPACE, Adapter


def add_to(app: typer.Typer) -> None:
    """Add this module's commands."""
    command(app, "register")(register)
    command(app, "update")(update)


def register(
    reference: Annotated[str | None, typer.Argument(help="A Hub id (user/lora-x) or a local folder.")] = None,
    *,
    from_file: Annotated[
        str | None,
        typer.Option(
            help="Many adapters: JSON lines, each a reference or an object with the fields of AdapterRequest; paths of "
            "samples count from this file's folder; - is stdin.",
            metavar="FILE",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="With --from-file: how many are pulled at a time.")] = 8,
    samples: SamplesFile = None,
    sample: Annotated[list[str] | None, typer.Option(help="One sample; may be repeated.")] = None,
    drop_samples: DropSamples = False,
    name: Annotated[str | None, typer.Option(help="Unique in its namespace; by default the Hub id.")] = None,
    revision: Revision = None,
    base_model: OwnBase = None,
    tag: Annotated[list[str] | None, typer.Option(help="A tag to search by; may be repeated.")] = None,
    description: Annotated[str | None, typer.Option(help="In place of the one in the adapter's card.")] = None,
    database: Database,
    endpoint: Endpoint = None,
    offline: Offline = False,
    namespace: Namespace = DEFAULT_NAMESPACE,
    actor: Actor = None,
    as_json: AsJson = False,
) -> Outcome:
    """Pull an adapter, check it, embed its samples and make it searchable; or many of them."""
    of_one = {
        "REFERENCE": reference,
        "--samples": samples,
        "--sample": sample,
        "--drop-samples": drop_samples,
        "--name": name,
        "--revision": revision,
        "--base-model": base_model,
        "--tag": tag,
        "--description": description,
    }
    if from_file is not None:
        _refuse_beside_file(of_one)
        lines = read_lines(from_file, namespace)
        quiet_libraries()
        with open_hub(database, endpoint, offline=offline, actor=actor, create=True) as hub:
            return register_lines(hub, lines, workers=workers, as_json=as_json)
    if reference is None:
        raise typer.BadParameter("name an adapter, or a file of them with --from-file")
    given = _samples(samples, sample)
    quiet_libraries()
    with open_hub(database, endpoint, offline=offline, actor=actor, create=True) as hub:
        adapter = hub.register(
            reference,
            samples=given,
            name=name,
            revision=revision,
            base_model=base_model,
            tags=tag or (),
            description=description,
            namespace=namespace,
            keep_samples=not drop_samples,
        )
    return Outcome(adapter_data(adapter), Text(f"registered {adapter.name} {_what(adapter)}"))


def update(
    name: AdapterName,
    *,
    revision: Revision = None,
    samples: SamplesFile = None,
    drop_samples: DropSamples = False,
    database: Database,
    endpoint: Endpoint = None,
    offline: Offline = False,
    namespace: Namespace = DEFAULT_NAMESPACE,
    actor: Actor = None,
    as_json: AsJson = False,
) -> Outcome:
    """Move an adapter to what its branch or folder holds now, or to a revision; or give it other samples."""
    given = _samples(samples)
    quiet_libraries()
    with open_hub(database, endpoint, offline=offline, actor=actor) as hub:
        before = hub.get(name, namespace=namespace)
        adapter = hub.update(name, revision=revision, samples=given, namespace=namespace, keep_samples=not drop_samples)
    if adapter == before:
        return Outcome(adapter_data(adapter), Text(f"{name} stays {_what(adapter)}; there is nothing newer"))
    return Outcome(adapter_data(adapter), Text(f"{name} is now {_what(adapter)}; it was at {before.revision[:12]}"))


def _samples(file: str | None, further: list[str] | None = None) -> Path | list[Any] | None:
    """What the hub takes: a file as it is, everything else read; None, not an empty list, where none were given."""
    if file is not None and file != "-" and not further:
        return Path(file)
    if file is None:
        return further or None
    from lora_hub_sdk.retriever.samples import read_samples

    return [*read_samples(sys.stdin if file == "-" else Path(file)), *(further or ())]


def _refuse_beside_file(of_one: Mapping[str, object]) -> None:
    """Options of one adapter make no sense for many, whose lines say it each for itself."""
    if given := [flag for flag, value in of_one.items() if value]:
        raise typer.BadParameter(f"{', '.join(given)} cannot stand beside --from-file; write it into the file's lines")


def _what(adapter: Adapter) -> str:
    vector = {
        "samples": f"{adapter.sample_count} samples",
        "owner": "a vector of its owner",
        "card": f"{adapter.sample_count} examples from its card",
        "guess": "a vector guessed from its weights and card",
    }[adapter.origin]
    return f"at {adapter.revision[:12]}: rank {adapter.rank}, {vector}"
