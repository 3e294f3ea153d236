"""Bytes of many ids at once against one at a time."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpt_encoder.arrays import decoder
from gpt_encoder.arrays.decoder import ArrayDecoder

# Tokens of every length about the stride's multiples, one of no bytes, and ids without a token.
TOKENS = {3 * place: bytes([65 + place]) * length for place, length in enumerate([1, 2, 7, 8, 9, 15, 16, 17, 24, 100, 0])}


@given(st.lists(st.sampled_from(list(TOKENS)), min_size=1, max_size=60), st.integers(1, 70))
@example([0], 1)
@example([27, 0, 27, 30, 27, 3, 6], 3)
def test_any_ids(ids: list[int], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "_BLOCK", block)
        assert ArrayDecoder(TOKENS).decode(ids) == b"".join(map(TOKENS.__getitem__, ids))


@pytest.mark.parametrize("wrong", [-1, 1, 2, 31, 2**31, 2**32, 2**63, 2**64 - 1, 2**64, -(2**40), 0.5, None, "0", [0]])
def test_an_id_without_token_is_left_to_others(wrong: object) -> None:
    assert ArrayDecoder(TOKENS).decode([0, 3, wrong, 0]) is None


def test_an_id_far_behind_all_others_needs_no_large_table() -> None:
    far = ArrayDecoder({**TOKENS, 10**9: b"far"})
    assert far.decode([0, 3]) == b"ABB"
    assert far.decode([0, 10**9]) is None
    assert len(far._lengths) == decoder._MAX_IDS
