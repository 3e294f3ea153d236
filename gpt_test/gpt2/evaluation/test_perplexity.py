"""Evaluation scores each token once, with the documented context, and equals transformers window by window."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gpt2 import GPT2
from gpt2.evaluation import evaluate
from gpt2.evaluation.detokenize import count_words, detokenize_ptb, detokenize_wikitext
from gpt2.evaluation.windows import windows
from gpt_config import ConfigError, DataError
from gpt_test.conftest import transformers_twin


@given(st.integers(2, 60), st.integers(1, 12), st.data())
def test_windows_score_each_token_once_with_at_least_the_documented_context(
    n: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    scored = []
    for window in windows(iter(range(n)), context, stride):
        assert window.ids == list(range(window.ids[0], window.ids[0] + len(window.ids)))
        assert len(window.ids) == min(context, n - 1) + 1
        new = window.ids[-window.n_scored :]
        assert all(token - window.ids[0] >= min(token, context - stride + 1) for token in new)
        scored += new
    assert scored == list(range(1, n))


@pytest.mark.parametrize(("n", "stride", "batch_size"), [(101, 40, 3), (101, 13, 4), (40, 40, 2), (2, 40, 1), (90, 1, 8)])
def test_the_results_equal_transformers_window_by_window(small_model: GPT2, n: int, stride: int, batch_size: int) -> None:
    ids = torch.randint(0, small_model.config.vocab_size, (n,), generator=torch.Generator().manual_seed(n))
    twin, total, right, begin, end = transformers_twin(small_model), 0.0, 0, 0, 0
    while end < n - 1:
        first_end, end = end, min(n - 1, 40 if end == 0 else end + stride)
        begin = max(0, end - 40)
        with torch.no_grad():
            logits = twin(ids[None, begin:end]).logits[0].double()
        new = slice(first_end - begin, None)
        total += F.cross_entropy(logits[new], ids[first_end + 1 : end + 1], reduction="sum").item()
        right += int((logits[new].argmax(-1) == ids[first_end + 1 : end + 1]).sum())
    result = evaluate(small_model, ids.tolist(), stride=stride, batch_size=batch_size)
    assert result.n_tokens == n - 1
    assert result.loss == pytest.approx(total / (n - 1), abs=1e-5)
    assert result.accuracy == right / (n - 1)
    assert result.perplexity == pytest.approx(math.exp(total / (n - 1)), rel=1e-5)


def test_ids_may_stream(small_model: GPT2) -> None:
    taken, done = [], []
    ids = (taken.append(1) or 5 for _ in range(1000))
    result = evaluate(small_model, ids, batch_size=2, progress=lambda n: done.append((len(taken), n)))
    assert result.n_tokens == 999 == sum(n for _, n in done)
    assert all(read <= 41 + 40 * 2 * (i + 1) for i, (read, _) in enumerate(done)), "the text is not read ahead"


def test_bad_sizes_and_too_little_text_are_errors(small_model: GPT2) -> None:
    for ids in ([], [1]):
        with pytest.raises(DataError, match="fewer than two"):
            evaluate(small_model, ids)
    with pytest.raises(ConfigError, match="context=41 is longer than the 40"):
        evaluate(small_model, [1, 2], context=41)
    with pytest.raises(ConfigError, match="stride=9 is longer than context=8"):
        evaluate(small_model, [1, 2], context=8, stride=9)
    with pytest.raises(ConfigError, match="stride=0"):
        evaluate(small_model, [1, 2], stride=0)


@pytest.mark.parametrize(
    ("tokenized", "plain"),
    [
        (' He said , " it \'s 3 @.@ 5 % ( or so ) " . \n', 'He said, "it\'s 3.5% (or so)".\n'),
        (" = = Early life = = \n", "== Early life ==\n"),
        (" twenty @-@ one 10 @,@ 000 ; don 't \n", "twenty-one 10,000; don't\n"),
        ("nothing to do", "nothing to do"),
    ],
)
def test_wikitext_becomes_ordinary_text(tokenized: str, plain: str) -> None:
    assert detokenize_wikitext(tokenized) == plain


def test_line_ends_count_as_words() -> None:
    assert count_words(" a b , \n \n c \n") == 4 + 3


PTB_WORDS = [
    "the", "<unk>", "N", "mr.", "u.s.", "n't", "'s", "'re", "'ve", "'ll", "'d", "'m", "'", "$", "#", "&", "o'neill",
    "'80s", "'em", "do"
]  # fmt: skip


@given(st.lists(st.lists(st.sampled_from(PTB_WORDS), min_size=1), min_size=1))
def test_the_treebank_can_be_split_into_words_again(lines: list[list[str]]) -> None:
    # The Treebank's tokenizer always splits these off, so a joined pair cannot be confused with a single original word.
    lines = [["the", *line] for line in lines]
    text = "".join(f" {' '.join(line)} \n" for line in lines)
    cut = re.compile(r"(?<=\S)((?:n't)|'(?:s|re|ve|ll|d|m)?)(?=n't(?:\s|$)|'(?:s|re|ve|ll|d|m)?(?:\s|$|')|\s|$)")
    again = detokenize_ptb(text)
    for _ in range(max(map(len, lines))):
        again = cut.sub(r" \1", again)
    again = re.sub(r"(?<!\S)([$#])N(?!\S)", r"\1 N", again)
    assert [line.split() for line in again.splitlines()] == lines


def test_the_treebank_becomes_ordinary_text() -> None:
    text = " but mr. <unk> said they ca n't pay investors ' $ N million & n't \n 's $ <unk> \n"
    assert detokenize_ptb(text) == "but mr. <unk> said they can't pay investors' $N million &n't\n's $ <unk>\n"
