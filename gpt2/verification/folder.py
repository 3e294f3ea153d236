"""Check a model folder for faults that occur in practice. It reads the raw files, because loading corrects some faults."""

from __future__ import annotations

import importlib.util
import math
from array import array
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from gpt2.reference.safetensors_reader import FLOAT_TYPES, read_config, read_floats
from gpt2.verification.checks import Outcome, Status
from gpt2.weights.safetensors_header import StoredTensor, read_header
from gpt_config.errors import GPT2Error
from gpt_config.file_reading import read_json
from gpt_config.model_config import CONFIG_FILES
from gpt_encoder.tokenizer import has_tokenizer, load_tokenizer

_COMPILED, _HEAD, _TABLE = "_orig_mod.", "lm_head.weight", "wte.weight"


def folder_checks(folder: Path) -> Iterator[Outcome]:
    """All checks of the files. If transformers is not installed, one outcome names the extra that installs it."""
    yield _outcome("config: n_ctx", *_n_ctx(folder))
    is_readable = yield from _weights_checks(folder)
    if is_readable or not importlib.util.find_spec("transformers"):
        yield _outcome("transformers: reads the folder", *_transformers(folder))


def _weights_checks(folder: Path) -> Generator[Outcome, None, bool]:
    """The checks of model.safetensors. Returns whether the file can be read.

    Weights in other files are not checked, because only the PyTorch engine reads them.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        yield _outcome(
            "weights", Status.SKIPPED, "there is no single model.safetensors: save the model again to have it checked"
        )
        return False
    try:
        tensors = read_header(path)
    except GPT2Error as error:
        yield _outcome("weights", Status.FAIL, str(error))
        return False
    yield _outcome("weights: names", *_names(tensors))
    yield _outcome("weights: tied head", *_tied(tensors))
    yield _outcome("weights: finite numbers", *_finite(tensors))
    yield _outcome("tokenizer: fits the vocabulary", *_vocabulary(folder, tensors))
    return True


def _outcome(part: str, status: Status, note: str = "") -> Outcome:
    return Outcome(part, "folder", "", "", status, note=note)


def _n_ctx(folder: Path) -> tuple[Status, str]:
    if not (folder / "config.json").is_file():
        return Status.SKIPPED, f"there is no config.json; {' or '.join(CONFIG_FILES[1:])} always contains n_ctx"
    try:
        values = read_json(folder / "config.json")
        positions, context = values.get("n_positions", 1024), values.get("n_ctx")
    except (OSError, ValueError, AttributeError) as error:
        return Status.FAIL, f"config.json cannot be read ({error}): copy or download it again"
    if context is None:
        return Status.WARNING, "n_ctx is missing, which older tools need: save the model again, or add n_ctx to config.json"
    if context != positions:
        return Status.FAIL, f"n_ctx is {context} and n_positions is {positions}: make them equal"
    return Status.PASS, ""


def _names(tensors: dict[str, StoredTensor]) -> tuple[Status, str]:
    compiled = [name for name in tensors if _COMPILED in name]
    if compiled:
        found = f"{len(compiled)} names contain {_COMPILED}, such as {compiled[0]}"
        return Status.FAIL, f"{found}: save the original model, not the one that torch.compile returned"
    return Status.PASS, ""


def _find(tensors: dict[str, StoredTensor], name: str) -> StoredTensor | None:
    return next((tensor for key, tensor in tensors.items() if key == name or key.endswith(f".{name}")), None)


def _tied(tensors: dict[str, StoredTensor]) -> tuple[Status, str]:
    head, table = _find(tensors, _HEAD), _find(tensors, _TABLE)
    if head is None or table is None:
        return Status.PASS, ""
    if head.shape != table.shape or read_floats(head) != read_floats(table):
        return Status.FAIL, f"{_HEAD} differs from {_TABLE}: this is no GPT-2, whose head equals its token embedding"
    return Status.PASS, ""


def _finite(tensors: dict[str, StoredTensor]) -> tuple[Status, str]:
    for name, tensor in tensors.items():
        if tensor.dtype in FLOAT_TYPES and not _is_finite(read_floats(tensor)):
            return Status.FAIL, f"{name} contains NaN or infinite numbers: use an earlier or an undamaged checkpoint"
    return Status.PASS, ""


def _is_finite(numbers: array[float]) -> bool:
    return math.isfinite(math.fsum(numbers)) if all(map(math.isfinite, numbers)) else False


def _vocabulary(folder: Path, tensors: dict[str, StoredTensor]) -> tuple[Status, str]:
    table = _find(tensors, _TABLE)
    if not has_tokenizer(folder) or table is None:
        return Status.SKIPPED, "the folder has no tokenizer"
    try:
        n_tokens, n_rows, stated = load_tokenizer(folder).vocab_size, table.shape[0], read_config(folder).vocab_size
    except GPT2Error as error:
        return Status.FAIL, str(error)
    if stated != n_rows:
        return Status.FAIL, f"vocab_size={stated} in config.json, but the token embedding has {n_rows} rows: make them equal"
    if n_tokens > n_rows:
        found = f"the tokenizer has {n_tokens} tokens, but the token embedding has {n_rows} rows"
        return Status.FAIL, f"{found}: use the tokenizer of this model"
    if n_tokens < n_rows:
        return Status.WARNING, f"{n_rows} rows for {n_tokens} tokens: a padded vocabulary, whose last ids have no token"
    return Status.PASS, ""


def _transformers(folder: Path) -> tuple[Status, str]:
    """Whether transformers finds every parameter in the folder. The checks of the whole model compare its logits."""
    if not importlib.util.find_spec("transformers"):
        return Status.SKIPPED, "transformers is not installed (pip install '.[verify]')"
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        found: Any = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # any error means that transformers could not read the folder
        return Status.FAIL, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    missing = sorted(found[1]["missing_keys"])
    if missing:
        return Status.FAIL, f"it does not find {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
    return Status.PASS, ""
