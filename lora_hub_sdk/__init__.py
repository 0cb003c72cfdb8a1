"""Many LoRA adapters, one model: retrieve those that fit each prompt, compose them, answer in one batch.

After *LoraRetriever: Input-Aware LoRA Retrieval and Composition for Mixed Tasks in the Wild* (arXiv 2402.09997).
Importing this package is instant; torch, transformers and chromadb load where they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from langchain_lora_hub import AdapterRetriever, ChatLoraRetriever, LoraRetrieverLLM, adapter_tool, hub_tools

    from lora_hub_sdk.composition.export import Exported
    from lora_hub_sdk.composition.ramole import Ramole
    from lora_hub_sdk.engine.base_model import ModelSettings
    from lora_hub_sdk.engine.gate_training import GateReport, GateTrainer
    from lora_hub_sdk.engine.metrics import EngineStats
    from lora_hub_sdk.engine.scheduler import EngineLimits
    from lora_hub_sdk.engine.settings import EngineSettings
    from lora_hub_sdk.errors import LoraHubError
    from lora_hub_sdk.hub import LoraHub
    from lora_hub_sdk.intake import AdapterRequest, RegisterOutcome
    from lora_hub_sdk.messages import Conversation, InvalidToolCall, Message, Tool, ToolCall, ToolCallPiece
    from lora_hub_sdk.registry.admission import Limits
    from lora_hub_sdk.retriever.evaluation import Evaluation, evaluate_retriever
    from lora_hub_sdk.retriever.publish import push_retriever
    from lora_hub_sdk.retriever.questions import Question, read_questions
    from lora_hub_sdk.retriever.tasks import Task, read_tasks
    from lora_hub_sdk.retriever.trainer import RetrieverTrainer
    from lora_hub_sdk.retriever.training_report import TrainingReport
    from lora_hub_sdk.types import (
        Adapter,
        Completion,
        Constraint,
        Event,
        Hit,
        Member,
        MinScore,
        Plan,
        Route,
        Routing,
        Sampling,
        Score,
        Timing,
        Trace,
        Usage,
    )

__version__ = "0.7.0"
__all__ = [
    "Adapter",
    "AdapterRequest",
    "AdapterRetriever",
    "ChatLoraRetriever",
    "Completion",
    "Constraint",
    "Conversation",
    "EngineLimits",
    "EngineSettings",
    "EngineStats",
    "Evaluation",
    "Event",
    "Exported",
    "GateReport",
    "GateTrainer",
    "Hit",
    "InvalidToolCall",
    "Limits",
    "LoraHub",
    "LoraHubError",
    "LoraRetrieverLLM",
    "Member",
    "Message",
    "MinScore",
    "ModelSettings",
    "Plan",
    "Question",
    "Ramole",
    "RegisterOutcome",
    "RetrieverTrainer",
    "Route",
    "Routing",
    "Sampling",
    "Score",
    "Task",
    "Timing",
    "Tool",
    "ToolCall",
    "ToolCallPiece",
    "Trace",
    "TrainingReport",
    "Usage",
    "adapter_tool",
    "evaluate_retriever",
    "hub_tools",
    "push_retriever",
    "read_questions",
    "read_tasks",
]

_TYPES: Final = (
    "Adapter",
    "Completion",
    "Constraint",
    "Event",
    "Hit",
    "Member",
    "MinScore",
    "Plan",
    "Route",
    "Routing",
    "Sampling",
    "Score",
    "Timing",
    "Trace",
    "Usage",
)
_MESSAGES: Final = ("Conversation", "InvalidToolCall", "Message", "Tool", "ToolCall", "ToolCallPiece")
_HOME: Final = {
    **dict.fromkeys(_TYPES, "lora_hub_sdk.types"),
    **dict.fromkeys(_MESSAGES, "lora_hub_sdk.messages"),
    **dict.fromkeys(("AdapterRequest", "RegisterOutcome"), "lora_hub_sdk.intake"),
    "EngineLimits": "lora_hub_sdk.engine.scheduler",
    "EngineSettings": "lora_hub_sdk.engine.settings",
    "EngineStats": "lora_hub_sdk.engine.metrics",
    "Exported": "lora_hub_sdk.composition.export",
    "Limits": "lora_hub_sdk.registry.admission",
    **dict.fromkeys(("GateReport", "GateTrainer"), "lora_hub_sdk.engine.gate_training"),
    "Ramole": "lora_hub_sdk.composition.ramole",
    "LoraHub": "lora_hub_sdk.hub",
    "LoraHubError": "lora_hub_sdk.errors",
    "ModelSettings": "lora_hub_sdk.engine.base_model",
    **dict.fromkeys(("Evaluation", "evaluate_retriever"), "lora_hub_sdk.retriever.evaluation"),
    **dict.fromkeys(("Question", "read_questions"), "lora_hub_sdk.retriever.questions"),
    **dict.fromkeys(("Task", "read_tasks"), "lora_hub_sdk.retriever.tasks"),
    "RetrieverTrainer": "lora_hub_sdk.retriever.trainer",
    "TrainingReport": "lora_hub_sdk.retriever.training_report",
    "push_retriever": "lora_hub_sdk.retriever.publish",
}
#: Names from the integrations: (module, extra that installs what it needs).
_GUESTS: Final = dict.fromkeys(
    ("AdapterRetriever", "ChatLoraRetriever", "LoraRetrieverLLM", "adapter_tool", "hub_tools"),
    ("langchain_lora_hub", "langchain"),
)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _GUESTS:
        module, extra = _GUESTS[name]
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name == module:
                raise
            from lora_hub_sdk.errors import MissingExtraError

            raise MissingExtraError(f"lora_hub_sdk.{name}", extra) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
