"""Evaluation: how well a model predicts text. Training and generation do not need it."""

from gpt2.evaluation.embedding import embed
from gpt2.evaluation.perplexity import Evaluation, evaluate
from gpt2.evaluation.scoring import Request, Score, log_likelihoods

__all__ = ["Evaluation", "Request", "Score", "embed", "evaluate", "log_likelihoods"]
