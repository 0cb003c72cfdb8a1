"""How the demo adapters were made: data sources, tasks, LoRA recipes and the training command.

Nothing here is needed to use the adapters. Run ``python -m lora_hub_sdk.demo.training.train`` with the
``demo-train`` extra installed to make them again.
"""
