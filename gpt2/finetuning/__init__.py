"""Fine-tune a pretrained GPT-2 for a task, with the trainer of `gpt2.training`. Generation does not import this package."""
