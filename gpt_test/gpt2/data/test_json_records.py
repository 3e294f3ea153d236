"""JSON lines and lists are read item by item, whatever the blocks are in which the file is read."""

from __future__ import annotations

from gpt2.data.json_records import NotJSON, json_lines, json_list
from gpt2.data.source import Source
from gpt2.data.text import BLOCK_BYTES


def test_a_number_at_the_end_of_a_block_goes_on_in_the_next() -> None:
    content = b"[" + b" " * (BLOCK_BYTES - 2) + b"12, 3]"
    assert list(json_list(Source("a.json", content), "utf-8")) == [("item 1", 12), ("item 2", 3)]


def test_blank_lines_count() -> None:
    first, second = json_lines(Source("a.jsonl", b'\n{"a": 1}\n \n\n{\n'), "utf-8")
    assert first == ("line 2", {"a": 1}) and second[0] == "line 5" and isinstance(second[1], NotJSON)
