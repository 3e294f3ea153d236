"""What a run does with its model: write it into the run's folder; generate a sample text and score tasks at each evaluation.

The trainer calls these functions. They depend on model files and generation, not on the trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gpt2.generation.completion import complete
from gpt2.model import GPT2
from gpt2.pretrained import save_model
from gpt_config.generation_config import GenerationConfig
from gpt_config.training_config import TrainingConfig
from gpt_encoder.interface import Tokenizer


def write_nothing(model: GPT2, folder: Path) -> None:
    """Write no model. The run writes only checkpoints and metrics."""


def no_sample(model: GPT2) -> str:
    """Return an empty text, which is not shown."""
    return ""


def no_scores(model: GPT2) -> dict[str, float]:
    """Return no figures."""
    return {}


@dataclass(frozen=True)
class Outputs:
    """`write(model, folder)` saves the best model so far. `sample(model)` returns a text to show, or "" for none.

    `scores(model)` returns figures by name for the metrics, as `TaskScores` does. It is called on the first process. The
    model is in eval mode when `sample` and `scores` are called. No function may change the weights.
    """

    write: Callable[[GPT2, Path], None] = write_nothing
    sample: Callable[[GPT2], str] = no_sample
    scores: Callable[[GPT2], dict[str, float]] = no_scores


class ModelWriter(Protocol):
    """Writes the model, or only its adapter, and the tokenizer's files into `folder`."""

    def __call__(self, model: GPT2, folder: Path, *, tokenizer: Tokenizer) -> None: ...


def text_outputs(tokenizer: Tokenizer, config: TrainingConfig, write_model: ModelWriter = save_model) -> Outputs:
    """Return the outputs of a language model: a model folder, and `sample_tokens` tokens after `sample_prompt`."""

    def write(model: GPT2, folder: Path) -> None:
        write_model(model, folder, tokenizer=tokenizer)

    def sample(model: GPT2) -> str:
        if not config.sample_prompt and not tokenizer.first_ids and model.config.bos_token_id is None:
            return ""  # there is no token to start from
        options = GenerationConfig(max_new_tokens=config.sample_tokens, do_sample=True, temperature=0.8, seed=config.seed)
        return config.sample_prompt + complete(model, tokenizer, config.sample_prompt, options)[0].text

    return Outputs(write, sample)
