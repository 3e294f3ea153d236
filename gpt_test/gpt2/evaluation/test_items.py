"""Task files are read as in lm-evaluation-harness, and the error for a malformed line gives its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.evaluation.items import Item, encode_pair, read_items
from gpt_config import DataError
from gpt_encoder import CharTokenizer, GPT2Tokenizer


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "items.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def test_lambada_is_the_last_word_after_a_space(tmp_path: Path) -> None:
    path = written(tmp_path, {"text": 'He said  so,\n"No way, John'}, "", {"text": "a b"})
    assert read_items(path, "lambada") == [
        Item((('He said  so,\n"No way,', " John"),), (4,)),
        Item((("a", " b"),), (1,)),
    ]


def test_hellaswag_in_its_original_format_is_prepared_as_in_lm_eval(tmp_path: Path) -> None:
    fields = {
        "activity_label": "Home and Garden", "ctx_a": "[header] How to paint [title] Buy paint. [step] Go  out.",
        "ctx_b": "the MAN", "ctx": "not this", "label": "2",
        "endings": ["[substeps] walks [title] far.", "runs.", "is", "it "],
    }  # fmt: skip
    [item] = read_items(written(tmp_path, fields), "hellaswag")
    query = "Home and Garden: How to paint. Buy paint. Go out. The man"
    assert item.pairs == ((query, "  walks. far."), (query, " runs."), (query, " is"), (query, " it"))
    assert item.answer == 2 and item.lengths == (12, 5, 2, 2)


def test_hellaswag_with_a_whole_context_is_unchanged(tmp_path: Path) -> None:
    fields = {"id": 0, "activity_label": "Roof", "ctx": "A man sits. he", "label": 1, "endings": ["jumps.", "sleeps."]}
    [item] = read_items(written(tmp_path, fields), "hellaswag")
    assert item == Item((("Roof: A man sits. he", " jumps."), ("Roof: A man sits. he", " sleeps.")), (6, 7), 1)


@pytest.mark.parametrize(
    ("names", "answer", "place"),
    [
        (("context", "answer"), 1, 1), (("query", "gold"), "b", 1), (("question", "label"), "C", 2),
        (("query", "answer"), "yes", 0), (("context", "gold"), "2", 2), (("context", "gold"), "B", 1),
    ],
)  # fmt: skip
def test_multiple_choice_accepts_each_field_name_and_kind_of_answer(
    tmp_path: Path, names: tuple[str, str], answer: Any, place: int
) -> None:
    fields = {names[0]: "Is it?", "choices": ["yes", "no", "may be"], names[1]: answer}
    [item] = read_items(written(tmp_path, fields), "multiple_choice", delimiter="\nAnswer: ")
    assert item.answer == place and item.lengths == (3, 2, 6)
    assert item.pairs[2] == ("Is it?\nAnswer: ", "may be")


def test_the_text_of_a_choice_has_precedence_over_letters_and_indices(tmp_path: Path) -> None:
    rows = [{"query": "q", "choices": ["1", "0"], "gold": "0"}, {"query": "q", "choices": ["B", "A"], "gold": "A"}]
    assert [item.answer for item in read_items(written(tmp_path, *rows), "multiple_choice")] == [1, 1]


def test_winograd_schemas_have_several_contexts(tmp_path: Path) -> None:
    fields = {"context_options": ["The city", "The men"], "continuation": "feared violence.", "gold": 1}
    [item] = read_items(written(tmp_path, fields), "multiple_choice")
    assert item == Item((("The city ", "feared violence."), ("The men ", "feared violence.")), (16, 16), 1)


CHOICES = {"query": "q", "choices": ["a", "b"], "gold": 0}


@pytest.mark.parametrize(
    ("task", "line", "words"),
    [
        ("lambada", "{", "not JSON"), ("lambada", "[]", "it is list"), ("lambada", {"txt": "a b"}, "'text' is missing"),
        ("lambada", {"text": 3}, "'text' is not a string"), ("lambada", {"text": "word"}, "no last word"),
        ("lambada", {"text": "word "}, "no last word"), ("lambada", {"text": " word"}, "no last word"),
        ("hellaswag", {"ctx": "a", "activity_label": "b", "endings": ["a", "[b]"], "label": 0}, "only markup"),
        ("hellaswag", {"ctx_a": "a", "activity_label": "b", "endings": ["a", "b"], "label": 0}, "'ctx_b' is missing"),
        ("hellaswag", {"ctx": "a", "activity_label": "b", "endings": ["a", "b"], "label": 2}, "2, which is none of the 2"),
        ("multiple_choice", {**CHOICES, "choices": ["a"]}, "not a list of at least two"),
        ("multiple_choice", {**CHOICES, "choices": ["a", " "]}, "not a list of at least two"),
        ("multiple_choice", {**CHOICES, "gold": True}, "True, which is none"),
        ("multiple_choice", {**CHOICES, "gold": -1}, "-1, which is none"),
        ("multiple_choice", {**CHOICES, "gold": "c"}, "'c', which is none"),
        ("multiple_choice", {"choices": ["a", "b"], "gold": 0}, "none of the fields context, query, question"),
        ("multiple_choice", {"query": "q", "choices": ["a", "b"]}, "none of the fields answer, gold, label"),
        ("multiple_choice", {"context_options": ["a", "b"], "continuation": " ", "gold": 0}, "'continuation' is empty"),
    ],
)  # fmt: skip
def test_the_error_for_a_malformed_line_gives_number_and_reason(tmp_path: Path, task: str, line: Any, words: str) -> None:
    with pytest.raises(DataError, match=rf"items.jsonl, line 2: .*{words}.*fix or remove"):
        read_items(written(tmp_path, "", line), task)


def test_no_file_and_no_items(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_items(tmp_path / "none", "lambada")
    with pytest.raises(DataError, match="no items"):
        read_items(written(tmp_path), "lambada")


def test_the_space_goes_to_the_continuation(openai_tokenizer: GPT2Tokenizer) -> None:
    expected = (openai_tokenizer.encode("Hello"), openai_tokenizer.encode(" world"))
    assert encode_pair(openai_tokenizer, "Hello", " world") == expected
    assert encode_pair(openai_tokenizer, "Hello ", "world") == expected
    for context in ("", " ", "\n"):
        assert encode_pair(openai_tokenizer, context, "world") == ([50256], openai_tokenizer.encode(f"{context}world"))
    assert encode_pair(CharTokenizer("ab"), "ab", "a") == ([0, 1], [0])


@settings(max_examples=30)
@given(context=st.text(min_size=1), continuation=st.text(min_size=1))
def test_both_parts_together_are_the_text(openai_tokenizer: GPT2Tokenizer, context: str, continuation: str) -> None:
    before, after = encode_pair(openai_tokenizer, context, continuation)
    assert after and openai_tokenizer.decode_bytes([t for t in [*before, *after] if t != 50256]) == (
        openai_tokenizer.decode_bytes(openai_tokenizer.encode(context + continuation))
    )
