"""Training: texts to token files, batches, the loop, checkpoints, several processes. Generation does not need it."""

from gpt2.training.loop import Stopped
from gpt2.training.preparation import TrainingData, prepare
from gpt2.training.trainer import Trainer

__all__ = ["Stopped", "Trainer", "TrainingData", "prepare"]
