"""Evaluation: how well a model predicts text. Training and generation do not need it."""

from gpt2.evaluation.perplexity import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
