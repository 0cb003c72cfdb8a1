"""lora_hub_sdk as a LangChain component."""

from langchain_lora_hub.llm import LoraRetrieverLLM

__all__ = ["LoraRetrieverLLM"]
