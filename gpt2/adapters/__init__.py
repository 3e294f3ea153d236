"""LoRA adapters: on the layers of a model, and as files in peft's format."""
