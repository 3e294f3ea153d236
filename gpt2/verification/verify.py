"""All checks of a model: first its files, then components and optimizers, then the tokenizer and the whole model.

It only runs the checks; the other modules of this package define them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from gpt2.verification.checks import Outcome, Status
from gpt2.verification.components import component_checks
from gpt2.verification.folder import folder_checks
from gpt2.verification.optimizers import optimizer_checks
from gpt2.verification.tokenizers import tokenizer_checks
from gpt2.verification.whole import model_checks
from gpt_config.errors import GPT2Error
from gpt_encoder.tokenizer import has_tokenizer, load_tokenizer


def verify(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Iterator[Outcome]:
    """Run all checks on the model in `folder`, and yield the Outcome of each.

    `progress` is called with the number of finished checks and their total. If an engine cannot read the folder, the checks
    of the whole model are skipped, and one failed outcome gives the reason.
    """
    yield from folder_checks(folder)
    checks = [*component_checks(), *optimizer_checks()]
    try:
        if has_tokenizer(folder):
            checks += tokenizer_checks(load_tokenizer(folder))
        _try_readers(folder)
        checks += model_checks(folder)
    except GPT2Error as error:
        yield Outcome("the whole model", "engines", "", "", Status.FAIL, note=str(error))
    for number, check in enumerate(checks):
        progress(number, len(checks))
        yield check.run()
    progress(len(checks), len(checks))


def _try_readers(folder: Path) -> None:
    """CheckpointError or ConfigError if a reader cannot make a model of the folder."""
    from gpt2.pretrained import load_model
    from gpt2.reference.safetensors_reader import find_parameters, read_config

    load_model(folder)
    find_parameters(folder, read_config(folder))
