"""ArrayDecoder: the bytes of many ids at once equal those of each id alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpt_encoder.arrays.decoder import ArrayDecoder, DecoderLimits

# Tokens of lengths near the multiples of the word size, one of no bytes, and ids without a token.
LENGTHS = [1, 2, 7, 8, 9, 15, 16, 17, 24, 100, 0]
TOKENS = {3 * place: bytes((20 * place + i) % 251 for i in range(length)) for place, length in enumerate(LENGTHS)}


@given(
    ids=st.lists(st.sampled_from(list(TOKENS)), max_size=60)
    | st.lists(st.sampled_from([0, 0, 3, 6, 9, 12, 30]), max_size=99),
    block=st.integers(1, 70),
    n_joins=st.sampled_from([0, 2, 3]),
)
@example([0], 1, 0)
@example([27, 0, 27, 30, 27, 3, 6], 3, 0)
@example([27, 27, 27, 0, 30, 12, 12, 6, 3], 3, 2)
@example([0, 3, 6, 0], 9, 2)
@example([0, 0, 9, 0, 0, 0, 0, 0, 27, 0, 0, 0, 0, 0, 0, 0, 9, 9, 9, 9, 9, 9, 9, 9], 12, 3)
def test_any_ids(ids: list[int], block: int, n_joins: int) -> None:
    """The ids are decoded one by one, in groups of four, and in groups of eight, whichever is fastest."""
    limits = DecoderLimits(
        block=block, bytes_for_eights=999 if n_joins == 3 else 0, bytes_for_fours=999 if n_joins == 2 else 0
    )
    assert ArrayDecoder(TOKENS, limits).decode(ids) == b"".join(map(TOKENS.__getitem__, ids))


@pytest.mark.filterwarnings("error")
def test_short_tokens_are_joined() -> None:
    seen: list[int] = []

    class RecordingDecoder(ArrayDecoder):
        def joined(self, ids: np.ndarray, n_joins: int) -> memoryview:
            seen.append(n_joins)
            return super().joined(ids, n_joins)

        def one_by_one(self, ids: np.ndarray) -> memoryview:
            seen.append(0)
            return super().one_by_one(ids)

    for ids in ([0] * 9, [0, 3] * 9, [3] * 9, [6] * 9, [0] * 9000 + [6] * 9000, []):
        assert RecordingDecoder(TOKENS).decode(ids) == b"".join(map(TOKENS.__getitem__, ids))
    assert seen == [3, 3, 2, 0, 0, 0]


@pytest.mark.parametrize("wrong", [-1, 1, 2, 31, 2**31, 2**32, 2**63, 2**64 - 1, 2**64, -(2**40), 0.5, None, "0", [0]])
def test_decode_returns_none_for_an_id_without_a_token(wrong: object) -> None:
    assert ArrayDecoder(TOKENS).decode([0, 3, wrong, 0]) is None


def test_an_id_far_above_all_others_needs_no_large_table() -> None:
    far = ArrayDecoder({**TOKENS, 10**9: b"far"})
    assert far.decode([0, 3]) == TOKENS[0] + TOKENS[3]
    assert far.decode([0, 10**9]) is None
    assert far.n_ids == DecoderLimits().max_ids
