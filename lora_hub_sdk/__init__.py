"""lora_hub_sdk."""
