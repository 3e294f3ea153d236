"""Train a model on text: token files, batches, the training loop, checkpoints and runs of several processes.

Generation does not import this package.
"""

from gpt2.training.loop import Stopped
from gpt2.training.preparation import TrainingData, prepare
from gpt2.training.trainer import Trainer

__all__ = ["Stopped", "Trainer", "TrainingData", "prepare"]
