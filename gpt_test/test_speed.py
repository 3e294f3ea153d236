"""Speed compared with transformers and tiktoken: `pytest gpt_test/test_speed.py -m slow -s` prints the ratios.

Only the equality of the results is asserted, because times depend on the machine and its load. The two sides take turns, and
the figure that counts is the median of the ratios.
"""

from __future__ import annotations

import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gpt2 import GPT2
from gpt_config import GPT2Config
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import THREADS_BY_DEFAULT, transformers_twin

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _as_many_threads_as_a_user_has() -> Iterator[None]:
    """Use the number of threads that a user has; all other tests compute on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS_BY_DEFAULT)
    yield
    torch.set_num_threads(threads)


def compare(
    name: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int, amount: float, unit: str
) -> None:
    """Time both sides `rounds` times. Print the work per second of each and the ratio of the speeds: median, min, max."""
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        began = time.perf_counter()
        our_result = ours()
        between = time.perf_counter()
        their_result = theirs()
        times.append((between - began, time.perf_counter() - between))
        assert our_result == their_result
    ratios = [theirs_s / ours_s for ours_s, theirs_s in times]
    our_rate, their_rate = (amount / statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"\n{name}: {our_rate:.1f} {unit} against {their_rate:.1f}, "
        f"{statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
    )


def test_greedy_decoding_against_transformers() -> None:
    """The 124M model with random weights in float32; a prompt of 32 tokens, 128 new tokens."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config.preset("gpt2")).eval()
    twin = transformers_twin(model)
    ids = torch.randint(0, 50257, (1, 32))

    def ours() -> list[list[int]]:
        return model.generate(ids, max_new_tokens=128, stop_at_eot=False).tolist()

    def theirs() -> list[list[int]]:
        with torch.inference_mode():
            return twin.generate(ids, max_new_tokens=128, min_new_tokens=128, do_sample=False, pad_token_id=50256).tolist()

    assert ours() == theirs()  # warm-up
    compare(f"decoding on {torch.get_num_threads()} threads", ours, theirs, 7, 128, "tokens/s")


def prose() -> str:
    """The docstrings of the standard library: English text that every machine has."""
    words = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        parts = path.read_text(encoding="utf-8", errors="replace").split('"""')
        words += [" ".join(line.split()) for part in parts[1::2] for line in part.split("\n")]
    return "\n".join(filter(None, words))


def code() -> str:
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


@pytest.mark.parametrize("make_text", [prose, code])
@pytest.mark.parametrize("state", ["seen before", "new"])
def test_encoding_against_tiktoken(make_text: Callable[[], str], state: str, tiktoken_gpt2) -> None:
    text = make_text()
    tokenizers = iter([GPT2Tokenizer.from_pretrained("gpt2") for _ in range(7)] if state == "new" else ())
    warm = GPT2Tokenizer.from_pretrained("gpt2")
    warm.encode(text)
    megabytes = len(text.encode()) / 1e6
    compare(
        f"encoding {megabytes:.1f} MB of {make_text.__name__}, {state}",
        lambda: next(tokenizers, warm).encode(text),
        lambda: tiktoken_gpt2.encode_ordinary(text),
        7,
        megabytes,
        "MB/s",
    )
