"""Fine-tuning: a pretrained GPT-2 put to a task, with the trainer of `gpt2.training`. Generation does not need it."""
