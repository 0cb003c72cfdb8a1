"""WHERE MODELS COME FROM: base models and encoders by path, Hub id, or embedded name."""

from lora_hub_sdk.models.bases import BaseModels
from lora_hub_sdk.models.fingerprint import weights_fingerprint
from lora_hub_sdk.models.names import EmbeddedModel, canonical_name, embedded
from lora_hub_sdk.models.resolve import ResolvedModel, resolve_model

__all__ = [
    "BaseModels",
    "EmbeddedModel",
    "ResolvedModel",
    "canonical_name",
    "embedded",
    "resolve_model",
    "weights_fingerprint",
]
