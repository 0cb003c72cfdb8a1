"""lora_hub_sdk as a LlamaIndex component."""

from llama_index_lora_hub.llm import LoraRetrieverLLM

__all__ = ["LoraRetrieverLLM"]
