"""Settings: what a benchmark measures, on which engines and how often. It measures nothing and does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from gpt_config.errors import ConfigError
from gpt_config.validation import check_real, check_seed, check_whole, plain_numbers

OURS = "gpt2-from-scratch"
# In the order in which they run. The last one takes minutes and gigabytes, so it is not a default.
SECTIONS = ("tokenizer", "decode", "prefill", "batch", "load", "training", "scaling")
DEFAULT_SECTIONS = SECTIONS[:-1]
# Packages, by their names for pip: first those that generate text, then those that only tokenize.
PEERS = ("transformers", "ctranslate2", "llama-cpp-python", "tiktoken", "tokenizers")
# Bytes per weight; the scales of int8 are not counted.
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one benchmark. ConfigError if a field is invalid.

    >>> Settings(sections=("decode",), rounds=3).new_tokens
    128
    """

    sections: tuple[str, ...] = DEFAULT_SECTIONS
    peers: tuple[str, ...] = PEERS
    dtypes: tuple[str, ...] = tuple(DTYPES)
    threads: int = 1
    device: str = "cpu"  # device of the models: cpu, cuda or cuda:1
    beside: int = 0  # processes that keep a core busy while engines are timed
    rounds: int = 5  # timed runs of each engine, after one warm-up
    seed: int = 0  # of random weights
    prompt_tokens: int = 32
    new_tokens: int = 128
    prefill_tokens: tuple[int, ...] = (128, 512)  # prompt lengths of section prefill
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    train_rows: int = 4
    train_context: int = 256
    dropout: float = 0.0  # in training
    compile: bool = False  # whether training uses torch.compile
    sizes: tuple[str, ...] = ("124M", "355M", "774M", "1558M")  # of section scaling: presets or names of models
    contexts: tuple[int, ...] = (64, 128, 256, 512, 1024)  # of section scaling, in tokens

    def __post_init__(self) -> None:
        plain_numbers(self)
        _check_names("sections", self.sections, SECTIONS)
        _check_names("peers", self.peers, PEERS, may_be_none=True)
        _check_names("dtypes", self.dtypes, tuple(DTYPES))
        for name in ("threads", "rounds", "prompt_tokens", "train_rows", "train_context"):
            check_whole(name, getattr(self, name), 1)
        # At least 2, because the first token and the tokens after it are timed separately.
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
