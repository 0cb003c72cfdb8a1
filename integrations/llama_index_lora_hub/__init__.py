"""lora_hub_sdk as a LlamaIndex component."""
