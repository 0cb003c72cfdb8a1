"""``lora-hub``: the registry, the search and the answers from the command line. Starts without torch."""

from lora_hub_sdk.cli.main import app, main

__all__ = ["app", "main"]
