"""lora_hub_sdk as a LangChain component."""

from langchain_lora_hub.chat import ChatLoraRetriever
from langchain_lora_hub.llm import LoraRetrieverLLM
from langchain_lora_hub.retriever import AdapterRetriever
from langchain_lora_hub.tools import adapter_tool, hub_tools

__all__ = ["AdapterRetriever", "ChatLoraRetriever", "LoraRetrieverLLM", "adapter_tool", "hub_tools"]
