"""collector_paused: no collection runs inside it, and the collector's previous state is restored."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt_config.collector import collector_paused
from gpt_config.errors import VocabularyError
from gpt_encoder import GPT2Tokenizer
from gpt_encoder.arrays.decoder import ArrayDecoder, DecoderLimits


@pytest.fixture
def collections() -> Iterator[list[str]]:
    """The phases of the collections so far: "start" and "stop"."""
    seen: list[str] = []

    def note(phase: str, _: dict[str, int]) -> None:
        seen.append(phase)

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_previous_state_is_restored(was_enabled: bool) -> None:
    try:
        if not was_enabled:
            gc.disable()
        with pytest.raises(ValueError), collector_paused():
            with collector_paused():
                assert not gc.isenabled()
            assert not gc.isenabled()
            raise ValueError
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()


@pytest.mark.parametrize("made_is_old", [True, False])
def test_new_objects_are_old_only_with_made_is_old(made_is_old: bool) -> None:
    with collector_paused(made_is_old):
        made: list[object] = []
    assert made_is_old == any(made is tracked for tracked in gc.get_objects(generation=2))


def test_objects_that_the_program_froze_stay_frozen() -> None:
    # This checks one object, because the number of frozen objects also falls when some of them are freed.
    followed: list[object] = []

    def is_frozen() -> bool:
        return not any(followed is tracked for tracked in gc.get_objects())  # lists all objects except the frozen ones

    assert not is_frozen()
    gc.freeze()
    try:
        assert is_frozen()
        with collector_paused(made_is_old=True):
            pass
        assert is_frozen()
    finally:
        gc.unfreeze()


def test_a_vocabulary_is_read_without_collections(collections: list[str], tmp_path: Path) -> None:
    GPT2Tokenizer.from_pretrained("gpt2")
    assert len(collections) <= 2 and gc.isenabled()  # one collection, after the pause
    with pytest.raises(VocabularyError):
        GPT2Tokenizer.from_pretrained(tmp_path)
    assert gc.isenabled()


def test_many_ids_are_decoded_without_collections(collections: list[str]) -> None:
    tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
    ids = [995] * 20_000
    expected = tokenizer.decode_bytes(ids)
    decoder = ArrayDecoder(tokenizer.token_bytes, DecoderLimits(block=16))
    gc.collect()
    collections.clear()
    assert decoder.decode(ids) == expected
    assert not collections
