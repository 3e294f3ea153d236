"""Measure this package and its peers in turns, on the same weights, prompts and threads. Not needed to use GPT-2."""

from gpt2.benchmark.settings import DEFAULT_SECTIONS, DTYPES, OURS, PEERS, SECTIONS, Settings

__all__ = ["DEFAULT_SECTIONS", "DTYPES", "OURS", "PEERS", "SECTIONS", "Settings"]
