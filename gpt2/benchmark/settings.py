"""Settings: what a benchmark measures, with whom, and how often. It measures nothing and needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from gpt_config.errors import ConfigError
from gpt_config.validation import check_real, check_seed, check_whole, plain_numbers

OURS = "gpt2-from-scratch"
# In the order in which they run. The last takes minutes and gigabytes, and must be asked for.
SECTIONS = ("tokenizer", "decode", "prefill", "batch", "load", "training", "scaling")
DEFAULT_SECTIONS = SECTIONS[:-1]
# Those that generate, then those that only tokenize; the names are those of the packages that pip installs.
PEERS = ("transformers", "ctranslate2", "llama-cpp-python", "tiktoken", "tokenizers")
# Bytes that a weight takes; the scales of int8 are left out.
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One benchmark; every field is validated on construction.

    >>> Settings(sections=("decode",), rounds=3).new_tokens
    128
    """

    sections: tuple[str, ...] = DEFAULT_SECTIONS
    peers: tuple[str, ...] = PEERS
    dtypes: tuple[str, ...] = tuple(DTYPES)
    threads: int = 1
    device: str = "cpu"  # or cuda, cuda:1: where models compute
    beside: int = 0  # processes that keep a core busy while engines are timed
    rounds: int = 5  # timed turns of each, after one to warm up
    seed: int = 0  # of random weights
    prompt_tokens: int = 32
    new_tokens: int = 128
    prefill_tokens: tuple[int, ...] = (128, 512)  # lengths of prompts
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    train_rows: int = 4
    train_context: int = 256
    dropout: float = 0.0  # in training
    compile: bool = False  # in training, by torch.compile
    sizes: tuple[str, ...] = ("124M", "355M", "774M", "1558M")  # of scaling: presets, or names of models
    contexts: tuple[int, ...] = (64, 128, 256, 512, 1024)  # of scaling

    def __post_init__(self) -> None:
        plain_numbers(self)
        _check_names("sections", self.sections, SECTIONS)
        _check_names("peers", self.peers, PEERS, may_be_none=True)
        _check_names("dtypes", self.dtypes, tuple(DTYPES))
        for name in ("threads", "rounds", "prompt_tokens", "train_rows", "train_context"):
            check_whole(name, getattr(self, name), 1)
        # The time of the first token is told from that of those after it.
        check_whole("new_tokens", self.new_tokens, 2)
        check_whole("beside", self.beside, 0)
        check_seed(self.seed)
        check_real("dropout", self.dropout, lambda p: 0 <= p < 1, "a probability of 0 or more and less than 1")
        for name, least in (("prefill_tokens", 1), ("batch_sizes", 1), ("contexts", 2)):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty: give at least one number", field=name)
            for value in getattr(self, name):
                check_whole(name, value, least)
        if not self.sizes:
            raise ConfigError("sizes is empty: give at least one, such as 124M", field="sizes")


def _check_names(field: str, names: tuple[str, ...], known: tuple[str, ...], *, may_be_none: bool = False) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{field}={name!r} is unknown: there are {', '.join(known)}", field=field)
    if not names and not may_be_none:
        raise ConfigError(f"{field} is empty: give at least one of {', '.join(known)}", field=field)
