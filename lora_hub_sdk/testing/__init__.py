"""What tests of and around this package need: shipped, so that others can use it."""

from lora_hub_sdk.testing.families import FAMILIES, byte_tokenizer, tiny_family
from lora_hub_sdk.testing.local_hub import LocalHub
from lora_hub_sdk.testing.tiny import raw_factors, tiny_adapter, tiny_base, tiny_encoder, unregistered

__all__ = [
    "FAMILIES",
    "LocalHub",
    "byte_tokenizer",
    "raw_factors",
    "tiny_adapter",
    "tiny_base",
    "tiny_encoder",
    "tiny_family",
    "unregistered",
]
