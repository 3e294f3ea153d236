"""This package beside its peers: the same weights, prompts and threads, in turns. Nothing here is needed to use GPT-2."""

from gpt2.benchmark.settings import DEFAULT_SECTIONS, DTYPES, OURS, PEERS, SECTIONS, Settings

__all__ = ["DEFAULT_SECTIONS", "DTYPES", "OURS", "PEERS", "SECTIONS", "Settings"]
