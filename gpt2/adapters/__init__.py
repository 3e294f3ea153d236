"""LoRA adapters: trainable low-rank layers of a model, and their files in peft's format."""
