"""An adapter of 0.3 MB that makes the embedded base model call tools, which it does not do by itself.

``python -m tests.tool_caller`` made it anew in some minutes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from lora_hub_sdk.chat.hermes import Hermes
from lora_hub_sdk.engine.conversation_prompt import ChatTemplate
from lora_hub_sdk.messages import Conversation, Message, Tool, ToolCall

TOOL_CALLER: Final = Path(__file__).parent / "adapters" / "tool-caller"

#: A question, the tool that answers it, and the call's arguments.
_CALLS: Final = (
    ("What is the weather in Oslo?", "get_forecast", "place", "Oslo"),
    ("What is the weather like in Boston, MA?", "weather_report", "city", "Boston, MA"),
    ("What time is it in Tokyo?", "get_time", "city", "Tokyo"),
    ("Find an adapter for translating into French.", "search_adapters", "query", "translating into French"),
    ("Which adapter is good at sentiment?", "search_adapters", "query", "sentiment"),
    ("Look up the phone number of Ann Lee.", "look_up", "name", "Ann Lee"),
    ("Book a table at Roma for tonight.", "book_table", "restaurant", "Roma"),
    ("Who wrote Faust? Search for it.", "web_search", "query", "Who wrote Faust?"),
)
#: What no tool is needed for.
_PLAIN: Final = (
    ("Hello, who are you?", "I am an assistant. How can I help you?"),
    ("Thank you!", "You are welcome."),
)
SAMPLES: Final = tuple(call[0] for call in _CALLS)


def train(base: Path, folder: Path, *, steps: int = 60) -> None:
    """Train it on a handful of questions with tools, in the words that our prompts tell of tools in."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    # Of the last layers alone, so that a step takes little more than a forward pass.
    modules = ["q_proj", "v_proj", "o_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, layers_to_transform=[*range(22, 30)])
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.0)
    rows = _rows(tokenizer)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 5, (steps - step) / steps * 2)
        ids, answer = rows[step % len(rows)]
        labels = ids.clone()
        labels[:, :-answer] = -100
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)  # noqa: T201 (training takes long)
    for weight in weights:
        weight.data = weight.data.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(folder)
    (folder / "README.md").unlink()


def _rows(tokenizer: Any) -> list[tuple[Any, int]]:
    """Token ids of prompts with their answers, of shape (1, n), and how many of them are the answers'."""
    tools = [_tool(name, parameter) for _, name, parameter, _ in _CALLS]
    rows = []
    for number, (question, name, parameter, value) in enumerate(_CALLS):
        shown = [_tool(name, parameter), *([tools[number - 1]] if number % 3 == 2 else [])]
        call = ToolCall(name, f'{{"{parameter}": "{value}"}}', "")
        rows.append(_row(tokenizer, question, shown, Hermes().written([call])))
    rows += [_row(tokenizer, question, tools[:1], answer) for question, answer in _PLAIN]
    return rows


def _tool(name: str, parameter: str) -> Tool:
    schema = f'{{"type": "object", "properties": {{"{parameter}": {{"type": "string"}}}}, "required": ["{parameter}"]}}'
    return Tool(name, f"{name.replace('_', ' ').capitalize()}.", schema)


def _row(tokenizer: Any, question: str, tools: list[Tool], answer: str) -> tuple[Any, int]:
    import torch

    prompt = ChatTemplate(tokenizer).render(Conversation.of([Message("user", question)], tools=tools))
    parts = [
        tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        for text in (prompt, f"{answer}<|im_end|>")
    ]
    return torch.cat(parts, dim=1), parts[1].shape[1]


if __name__ == "__main__":
    from lora_hub_sdk.models import resolve_model

    train(resolve_model("smollm2-135m-instruct", offline=True).folder, TOOL_CALLER)
