"""``train-gate`` and ``train-experts``: weights for each token and module, learned from the adapters of a registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from lora_hub_sdk.cli.command import Outcome, command
from lora_hub_sdk.cli.opening import open_hub, quiet_libraries
from lora_hub_sdk.cli.options import AsJson, Database, Endpoint, Index, Namespace, NearestCount, Offline
from lora_hub_sdk.types import DEFAULT_NAMESPACE

if TYPE_CHECKING:
    from lora_hub_sdk.engine.expert_training import ExpertReport
    from lora_hub_sdk.engine.gate_training import GateReport


def add_to(app: typer.Typer) -> None:
    """Add this module's commands."""
    command(app, "train-gate")(train_gate)
    command(app, "train-experts")(train_experts)


def train_gate(
    output: Annotated[str, typer.Argument(help="A new safetensors file.")],
    *,
    base_model: Annotated[str, typer.Option(help="Folder, Hub id or embedded name.")] = "smollm2-135m-instruct",
    rows: Annotated[
        str | None,
        typer.Option(
            help='JSON lines of {"inputs", "targets", "adapter"}; by default the samples, and the adapters\' answers.',
            metavar="FILE",
        ),
    ] = None,
    fraction: Annotated[float, typer.Option(help="The share of the adapters that is trained on.")] = 1.0,
    k: NearestCount = 3,
    width: Annotated[int, typer.Option(help="Of queries and keys.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the split, the order, the drops and the first weights.")] = 0,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 200,
    batch: Annotated[int, typer.Option(help="Rows a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="The highest of the training.")] = 3e-3,
    drop: Annotated[float, typer.Option(help="How often an adapter is left out, its own of a row too.")] = 0.3,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Number format of the base model.")
    ] = "auto",
    database: Database,
    index: Index,
    endpoint: Endpoint = None,
    offline: Offline = False,
    namespace: Namespace = DEFAULT_NAMESPACE,
    as_json: AsJson = False,
) -> Outcome:
    """Train a gate for `generate --strategy ramole`; run again after a kill, it goes on where it was."""
    quiet_libraries()
    from lora_hub_sdk.engine.base_model import ModelSettings

    with open_hub(database, endpoint, index=index, offline=offline) as hub:
        report = hub.train_gate(
            base_model=base_model,
            output=output,
            fraction=fraction,
            rows=rows,
            namespace=namespace,
            k=k,
            width=width,
            seed=seed,
            steps=steps,
            batch=batch,
            learning_rate=learning_rate,
            drop=drop,
            settings=ModelSettings(dtype),
            progress=not as_json,
        )
    return Outcome(report.as_dict(), Text(_told(report)))


def train_experts(
    output: Annotated[str, typer.Argument(help="A new safetensors file.")],
    *,
    strategy: Annotated[str, typer.Option(help="moe-soft, moe-top3, moe-top1, smear or arrow.")],
    base_model: Annotated[str, typer.Option(help="Folder, Hub id or embedded name.")] = "smollm2-135m-instruct",
    expert: Annotated[
        list[str] | None,
        typer.Option(help="An adapter's name; may be repeated. By default all that a gate can weigh.", metavar="NAME"),
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help='JSON lines of {"inputs", "targets"}; none for arrow.', metavar="FILE")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the rows' order and the noise.")] = 0,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 140,
    batch: Annotated[int, typer.Option(help="Rows a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="The highest of the training.")] = 3e-3,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Number format of the base model.")
    ] = "auto",
    database: Database,
    index: Index,
    endpoint: Endpoint = None,
    offline: Offline = False,
    namespace: Namespace = DEFAULT_NAMESPACE,
    as_json: AsJson = False,
) -> Outcome:
    """Make a gate over fixed experts for `generate --strategy`; run again after a kill, it goes on where it was."""
    quiet_libraries()
    from lora_hub_sdk.engine.base_model import ModelSettings

    with open_hub(database, endpoint, index=index, offline=offline) as hub:
        report = hub.train_experts(
            strategy=strategy,
            base_model=base_model,
            output=output,
            experts=expert,
            rows=rows,
            namespace=namespace,
            seed=seed,
            steps=steps,
            batch=batch,
            learning_rate=learning_rate,
            settings=ModelSettings(dtype),
            progress=not as_json,
        )
    return Outcome(report.as_dict(), Text(_told_of_experts(report)))


def _told_of_experts(report: ExpertReport) -> str:
    lines = [f"{report.strategy} over {len(report.experts)} experts: {', '.join(report.experts)}"]
    if report.steps:
        lines.append(f"trained on {report.rows} rows, {report.steps} steps in {report.seconds:.0f} s")
    if report.validation and report.uniform_loss is not None:
        lines.append(
            f"loss on {report.held_out} other rows: all alike {report.uniform_loss:.3f}, gate "
            f"{report.validation[-1][1]:.3f}"
        )
    lines += [f"left out {name}: {why}" for name, why in report.skipped.items()]
    lines.append(f"wrote {report.file}")
    return "\n".join(lines)


def _told(report: GateReport) -> str:
    lines = [
        f"trained on {report.rows} rows of {len(report.trained)} adapters, {report.steps} steps in "
        f"{report.seconds:.0f} s"
    ]
    if report.validation and report.uniform_loss is not None and report.own_loss is not None:
        lines.append(
            f"loss on {report.held_out} other rows: own adapter alone {report.own_loss:.3f}, uniform mixture "
            f"{report.uniform_loss:.3f}, gate {report.validation[-1][1]:.3f}"
        )
    lines += [f"left out {name}: {why}" for name, why in report.skipped.items()]
    lines.append(f"wrote {report.file}")
    return "\n".join(lines)
