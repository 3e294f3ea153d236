"""LoRA adapters: layers that add them to a model, and files in peft's format."""
