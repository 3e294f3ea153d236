"""End tokens: config.json and generation_config.json state them, and every way to generate ends where transformers does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2 import GPT2, complete
from gpt2.reference import python_gpt2
from gpt2.reference.numpy_generation import stream_ids
from gpt2.reference.numpy_model import NumpyGPT2
from gpt_config import ConfigError, GenerationConfig, GPT2Config
from gpt_encoder import load_tokenizer
from gpt_test.conftest import random_model

CONFIG = GPT2Config(vocab_size=60, n_positions=48, n_embd=24, n_layer=2, n_head=3, eos_token_id=None, bos_token_id=None)
PROMPT = [3, 1, 4]
N = 12
_ABSENT = object()


@pytest.fixture(scope="module")
def free_ids() -> list[int]:
    """The greedy continuation of PROMPT without an end token."""
    ids = random_model(CONFIG).generate(torch.tensor([PROMPT]), max_new_tokens=N)[0, len(PROMPT) :].tolist()
    assert len(set(ids)) >= 4
    return ids


def folder_with(folder: Path, config_json: Any, generation_json: Any = _ABSENT) -> Path:
    random_model(CONFIG).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"eos_token_id": config_json}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation_json is not _ABSENT:
        (folder / "generation_config.json").write_text(json.dumps(generation_json))
    return folder


def transformers_ids(folder: Path) -> list[int]:
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    ids = torch.tensor([PROMPT])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=N, do_sample=False, pad_token_id=0)
    return made[0, len(PROMPT) :].tolist()


def our_ids(folder: Path) -> dict[str, list[int]]:
    """The new ids from every way to generate, which end with the end token if there is one."""
    model, ids = GPT2.from_pretrained(folder), torch.tensor([PROMPT])
    numpy_model = NumpyGPT2.from_pretrained(folder)
    n = len(PROMPT)
    return {
        "cache": model.generate(ids, max_new_tokens=N)[0, n:].tolist(),
        "no cache": model.generate(ids, max_new_tokens=N, use_cache=False)[0, n:].tolist(),
        "int8 or several at once": model.generate(ids.repeat(2, 1), max_new_tokens=N)[0, n:].tolist(),
        "drafts": model.generate(ids, max_new_tokens=N, speculate=True)[0, n:].tolist(),
        "numpy": list(stream_ids(numpy_model, PROMPT, GenerationConfig(max_new_tokens=N))),
        "python": list(python_gpt2.generate(python_gpt2.load_model(folder), PROMPT, max_new_tokens=N)),
    }


@pytest.mark.parametrize(
    ("config_json", "generation_json"),
    [
        ("third", _ABSENT), (["third"], _ABSENT), (["unused", "third", "second"], _ABSENT), (-1, _ABSENT), (None, _ABSENT),
        (999, _ABSENT), ([999, "third"], _ABSENT),
        ("unused", {"eos_token_id": "third"}), ("third", {"eos_token_id": ["second", "third"]}), ("third", {}),
        ("third", {"eos_token_id": None}), (None, {"eos_token_id": "second", "do_sample": True, "temperature": 0.3}),
        ("third", {"eos_token_id": -1}),
    ],
)  # fmt: skip
def test_texts_end_where_transformers_ends_them(config_json, generation_json, free_ids: list[int], tmp_path: Path) -> None:
    new = list(dict.fromkeys(free_ids))
    named = {"second": new[1], "third": new[2], "unused": next(i for i in range(60) if i not in free_ids)}

    def with_ids(value: Any) -> Any:
        if isinstance(value, list):
            return [with_ids(item) for item in value]
        if isinstance(value, dict):
            return {key: with_ids(item) for key, item in value.items()}
        return named.get(value, value) if isinstance(value, str) else value

    given = _ABSENT if generation_json is _ABSENT else with_ids(generation_json)
    folder = folder_with(tmp_path / "m", with_ids(config_json), given)
    if isinstance(generation_json, dict) and generation_json.get("do_sample"):
        expected = free_ids[: free_ids.index(new[1]) + 1]  # transformers would draw at random
    else:
        expected = transformers_ids(folder)
    found = our_ids(folder)
    assert found == dict.fromkeys(found, expected)
    GPT2.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert our_ids(tmp_path / "again") == found
    if "do_sample" not in (given if isinstance(given, dict) else {}):
        assert transformers_ids(tmp_path / "again") == expected


def test_beam_search_ends_at_each_end_token(free_ids: list[int], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = folder_with(tmp_path / "m", [free_ids[3], free_ids[1]])
    ids = torch.tensor([PROMPT])
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=N, num_beams=3, do_sample=False, pad_token_id=0
    )
    ours = GPT2.from_pretrained(folder).generate(ids, max_new_tokens=N, num_beams=3)
    assert ours.tolist() == theirs.tolist() and ours.shape[1] < len(PROMPT) + N


def test_shorter_rows_are_filled_with_the_first_end_token(free_ids: list[int], tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", [free_ids[1], free_ids[3]])
    ids = torch.tensor([PROMPT, [9, 9, 9]])
    made = GPT2.from_pretrained(folder).generate(ids, max_new_tokens=N)
    assert made[0, len(PROMPT) :].tolist()[1:] == [free_ids[1]] * (made.shape[1] - len(PROMPT) - 1)


def test_the_text_of_an_end_token_is_not_part_of_the_completion(small_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_folder, tmp_path / "m"))
    tokenizer = load_tokenizer(folder)
    free = complete(GPT2.from_pretrained(folder), tokenizer, "the cat", max_new_tokens=8)[0]
    end = free.ids[-1]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, end]}))
    ended = complete(GPT2.from_pretrained(folder), tokenizer, "the cat", max_new_tokens=8)[0]
    n = free.ids.index(end) + 1
    assert ended.ids == free.ids[:n] and ended.finish_reason == "eot" and ended.text == tokenizer.decode(free.ids[: n - 1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "generation_config.json is not valid JSON"), ("[1]", "generation_config.json must be a JSON object"),
        ('{"eos_token_id": "</s>"}', "generation_config.json: eos_token_id='</s>' must be a whole number"),
    ],
)  # fmt: skip
def test_a_damaged_generation_config_is_named(content: str, message: str, small_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_folder, tmp_path / "m"))
    (folder / "generation_config.json").write_text(content)
    for load in (GPT2.from_pretrained, NumpyGPT2.from_pretrained, python_gpt2.load_model):
        with pytest.raises(ConfigError, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
