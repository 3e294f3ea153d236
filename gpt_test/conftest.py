"""Fixtures and helpers of several test files: an unreachable hub, tiny models, and reference implementations."""

from __future__ import annotations

import gc
import os
import signal

# No test may use the network. These are set first, because the hub client and transformers read them once, on import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2 import GPT2
from gpt2.quantization import kernels, layers
from gpt_config import GPT2Config
from gpt_config.cores import available_cores
from gpt_encoder import GPT2Tokenizer, train_bpe
from gpt_test import without_hypothesis
from gpt_test.browser import start_browser
from gpt_test.warm_python import warm_python

try:
    from hypothesis import settings
except ModuleNotFoundError:
    without_hypothesis.install()
else:
    settings.register_profile("gpt2", deadline=None, print_blob=True)
    settings.load_profile("gpt2")

# `nohup` and a shell's `&` start processes that ignore these signals, and so would those that the tests start and signal.
for _name, _handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    _number = getattr(signal, _name, None)  # Windows has no SIGHUP
    if _number is not None and signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

# The matrices of the tests are small, so one thread is as fast as several and leaves the other cores free. Processes that
# the tests start read the variable. `OMP_NUM_THREADS=4 pytest ...` overrides this.
THREADS_BY_DEFAULT = torch.get_num_threads()
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

HERE = Path(__file__).resolve().parent
MOST_PROCESSES = 8  # each takes 0.7 GB

TRAINING_TEXT = """Once upon a time there was a small cat who lived by the sea. Every day the cat went down to the water
and looked at the boats. "Where do they go?" asked the cat. "Far away," said the old dog, "and then they come home again."
So the cat waited, and waited, until one evening a boat came home with a fish for every cat in the town."""


@pytest.fixture(autouse=True)
def _empty_hub_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the hub's cache by an empty folder, so that no test finds models in the machine's cache."""
    import huggingface_hub.constants

    folder = str(tmp_path_factory.mktemp("hub"))
    monkeypatch.setenv("HF_HUB_CACHE", folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", folder)


@pytest.fixture(autouse=True)
def _nothing_stays_frozen() -> Iterator[None]:
    """Undo `gc.freeze()` after each test. Commands call it because their process ends soon; the test process continues."""
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def openai_tokenizer() -> GPT2Tokenizer:
    return GPT2Tokenizer.from_pretrained("gpt2")


@pytest.fixture(scope="session")
def tiktoken_gpt2(openai_tokenizer: GPT2Tokenizer):
    """tiktoken's gpt2 encoding, built from the shipped files, because tiktoken's own loader would download them."""
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed (pip install -r requirements-dev.txt)")
    ranks = {token: token_id for token_id, token in openai_tokenizer.token_bytes.items() if token_id != 50256}
    from tiktoken_ext.openai_public import r50k_pat_str  # the pattern of tiktoken, independent of ours

    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
        explicit_n_vocab=50257,
    )


@pytest.fixture(scope="session")
def small_tokenizer() -> GPT2Tokenizer:
    """A tokenizer with 300 tokens, learned from TRAINING_TEXT."""
    return train_bpe([TRAINING_TEXT], vocab_size=300)


@pytest.fixture(scope="session")
def small_config(small_tokenizer: GPT2Tokenizer) -> GPT2Config:
    return GPT2Config(
        vocab_size=small_tokenizer.vocab_size, n_positions=40, n_embd=24, n_layer=2, n_head=3,
        bos_token_id=small_tokenizer.eot_token_id, eos_token_id=small_tokenizer.eot_token_id,
    )  # fmt: skip


@pytest.fixture(scope="session")
def small_model(small_config: GPT2Config) -> GPT2:
    return repetitive_model(small_config)


@pytest.fixture(scope="session")
def small_folder(small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer. A test that changes files must copy it first."""
    folder = tmp_path_factory.mktemp("models") / "small"
    small_model.save_pretrained(folder, tokenizer=small_tokenizer)
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    started = start_browser()
    yield started
    started.quit()


@pytest.fixture(scope="session")
def warm_commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the commands `python` and `gpt2`. They start at once, as forks of one process."""
    folder = tmp_path_factory.mktemp("bin")
    with warm_python(
        str(folder / "socket"), {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    ) as python:
        for name, text in (("python", python), ("gpt2", '#!/bin/sh\nexec python -m gpt2 "$@"\n')):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        yield folder


def random_model(config: GPT2Config, seed: int = 0, dtype: torch.dtype = torch.float32, *, positions: float = 3.0) -> GPT2:
    """A model in eval mode. All parameters, also of norms and biases, are random and far from their initial values.

    `positions` is the standard deviation of the position embedding. With 0.15, as in all other parameters, greedy decoding
    repeats one token, so a test could not see an error in the ids. With larger values the texts vary.
    """
    generator = torch.Generator().manual_seed(seed)
    model = GPT2(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(centre + (positions if name == "wpe.weight" else 0.15) * noise)
    return model.eval()


def repetitive_model(config: GPT2Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT2:
    """A `random_model` with repetitive greedy texts, which are easy to draft. It also trains quickly."""
    return random_model(config, seed, dtype, positions=0.15)


def skip_unless_rows_are_rounded_alone() -> None:
    """Skip a test whose int8 products must not depend on the other rows of the batch."""
    if not kernels.multiplies_given_steps():
        pytest.skip("this torch has no operator for int8 products with given scales")
    if not layers.rounds_each_alone():
        pytest.skip("on this processor int8 products of several rows differ from those of each row alone")


def transformers_twin(model: GPT2):
    """transformers' GPT-2 with the same weights, in eval mode."""
    transformers = pytest.importorskip("transformers")
    values = {key: value for key, value in model.config.to_dict().items() if key not in ("architectures", "model_type")}
    twin = transformers.GPT2LMHeadModel(transformers.GPT2Config(**values)).to(model.wte.weight.dtype)
    result = twin.transformer.load_state_dict(model.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    return twin.eval()


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole of the tests in a process per core where pytest-xdist is installed. `-n 0` runs them in one."""
    option = config.option
    paths = [Path(argument).resolve() for argument in config.args]
    is_whole = paths == [HERE] and option.markexpr == "not slow" and not option.keyword
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # this is one of the processes
    if is_whole and getattr(option, "numprocesses", 0) is None and not option.usepdb and not option.collectonly:
        option.numprocesses, option.dist = min(available_cores().count, MOST_PROCESSES), "loadgroup"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the blocks of the pages: those of one page run one after another, and at the end would run alone."""
    items.sort(key=lambda item: item.path.name != "test_documentation.py")
