"""Weights on disk and on the hub: `load_model` and `save_model`, on which GPT2.from_pretrained and save_pretrained rest."""

from gpt2.checkpoints.loading import load_model
from gpt2.checkpoints.model_tokenizer import load_tokenizer_for, tokenizer_of
from gpt2.checkpoints.saving import save_model

__all__ = ["load_model", "load_tokenizer_for", "save_model", "tokenizer_of"]
