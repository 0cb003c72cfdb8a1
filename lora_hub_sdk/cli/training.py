"""``train-retriever`` and ``push-retriever``: an encoder of one's own, from the samples of the adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from lora_hub_sdk.cli.command import Outcome, command
from lora_hub_sdk.cli.opening import open_hub, quiet_libraries
from lora_hub_sdk.cli.options import AsJson, Database, Endpoint, Offline, OneNamespace

if TYPE_CHECKING:
    from pathlib import Path

    from lora_hub_sdk.retriever.left_out import LeftOut
    from lora_hub_sdk.retriever.training_report import TrainingReport


def add_to(app: typer.Typer) -> None:
    """Add this module's commands."""
    command(app, "train-retriever")(train_retriever)
    command(app, "push-retriever")(push)


def train_retriever(
    output: Annotated[str, typer.Argument(help="A new folder, which becomes a sentence-transformers model.")],
    *,
    tasks: Annotated[
        str | None,
        typer.Option(
            help='JSON lines of {"task", "domain", "inputs"}: train on these instead of the registry\'s samples.',
            metavar="FILE",
        ),
    ] = None,
    fraction: Annotated[
        float, typer.Option(help="The share of the adapters that is trained on; the others measure.")
    ] = 1.0,
    encoder: Annotated[str, typer.Option(help="What is trained on: a folder, a Hub id, or an embedded name.")] = (
        "all-minilm-l6-v2"
    ),
    seed: Annotated[int, typer.Option(help="Of the split, the pairs and the dropout.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Training steps; by default six passes over the samples.")] = None,
    negatives: Annotated[int, typer.Option(help="How many other tasks each pair is held against.")] = 15,
    temperature: Annotated[float, typer.Option(help="Of the contrastive loss.")] = 0.05,
    learning_rate: Annotated[float, typer.Option(help="The highest of the training.")] = 5e-5,
    validation: Annotated[
        float, typer.Option(help="The share of the trained adapters that is held out to stop early by.")
    ] = 0.0,
    device: Annotated[str | None, typer.Option(help="As torch names it; by default a GPU where there is one.")] = None,
    push_to: Annotated[
        str | None,
        typer.Option("--push", help="A Hub repository that gets it once it is trained.", metavar="USER/NAME"),
    ] = None,
    switch: Annotated[bool, typer.Option("--switch", help="Search with it from now on, once it is trained.")] = False,
    database: Database,
    endpoint: Endpoint = None,
    offline: Offline = False,
    namespace: OneNamespace = None,
    as_json: AsJson = False,
) -> Outcome:
    """Train an encoder to tell the adapters apart; run again after a kill, it goes on where it was."""
    recipe: dict[str, Any] = {
        "encoder": encoder,
        "seed": seed,
        "steps": steps,
        "negatives": negatives,
        "temperature": temperature,
        "learning_rate": learning_rate,
        "validation": validation,
        "device": device,
        "progress": not as_json,
    }
    quiet_libraries()
    if push_to is not None:
        _require_pushable(push_to, offline=offline)
    if tasks is not None:
        if switch or namespace is not None:
            raise typer.BadParameter("--switch and --namespace are of a registry's adapters, --tasks of a file")
        from lora_hub_sdk.retriever.trainer import RetrieverTrainer

        trainer = RetrieverTrainer(endpoint=endpoint, offline=offline, **recipe)
        report = trainer.fit_jsonl(tasks, output_dir=output, fraction=fraction)
        told, data = _told(report), report.as_dict()
        return _pushed(report.folder, push_to, endpoint, told, data)
    with open_hub(database, endpoint, offline=offline) as hub:
        report = hub.train_retriever(output_dir=output, fraction=fraction, namespace=namespace, **recipe)
        told, data = _told(report), report.as_dict()
        if switch:
            data["switched"] = hub.switch_encoder(report.folder)
            told += f"\nsearched with it from now on; {data['switched']} adapters were embedded"
    return _pushed(report.folder, push_to, endpoint, told, data)


def push(
    folder: Annotated[str, typer.Argument(help="What train-retriever wrote.")],
    repo_id: Annotated[str, typer.Argument(help="Made where it is not there yet.", metavar="USER/NAME")],
    *,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> Outcome:
    """Publish a trained retriever; others then use it by that name. Needs HF_TOKEN, or `hf auth login`."""
    from lora_hub_sdk.retriever.publish import push_retriever

    quiet_libraries()
    commit = push_retriever(folder, repo_id, endpoint=endpoint, private=private)
    return Outcome({"repo_id": repo_id, "commit": commit}, Text(f"pushed to {repo_id} as commit {commit}"))


def _require_pushable(repo_id: str, *, offline: bool) -> None:
    """Before a training that may take hours."""
    from lora_hub_sdk.retriever.publish import check_repo_id

    if offline:
        raise typer.BadParameter("--offline asks no Hub, --push needs one")
    check_repo_id(repo_id)


def _pushed(folder: Path, repo_id: str | None, endpoint: str | None, told: str, data: dict[str, Any]) -> Outcome:
    if repo_id is not None:
        from lora_hub_sdk.retriever.publish import push_retriever

        commit = push_retriever(folder, repo_id, endpoint=endpoint)
        data["pushed"] = {"repo_id": repo_id, "commit": commit}
        told += f"\npushed to {repo_id} as commit {commit}"
    return Outcome(data, Text(told))


def _told(report: TrainingReport) -> str:
    lines = [
        f"trained on {report.texts} texts of {len(report.trained)} adapters in {report.seconds:.0f} s; kept step "
        f"{report.best_step} of {report.steps}",
        *_moved("their samples", report.before, report.after),
        *_moved("samples of adapters never seen", report.unseen_before, report.unseen_after),
        f"wrote {report.folder}",
    ]
    return "\n".join(lines)


def _moved(what: str, before: LeftOut | None, after: LeftOut | None) -> list[str]:
    if before is None or after is None:
        return []
    shares = (
        f"{name} {100 * one:.1f} -> {100 * other:.1f} %"
        for name, one, other in (("first", before.top_1, after.top_1), ("among three", before.top_3, after.top_3))
    )
    return [f"{what} find their own adapter: {', '.join(shares)}"]
