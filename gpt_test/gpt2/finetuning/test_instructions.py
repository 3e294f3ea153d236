"""Records become prompts and responses. The loss is that of the responses, however a batch is divided."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt2 import GPT2
from gpt2.finetuning.instructions import (
    Example,
    InstructionTuning,
    ResponseLoss,
    Turn,
    conversation,
    make_examples,
    with_thoughts,
)
from gpt2.finetuning.records import BadRecord
from gpt2.finetuning.template import TEMPLATE_FILE, TEMPLATES, InstructionTemplate
from gpt_config import ConfigError, DataError, TrainingConfig
from gpt_encoder import GPT2Tokenizer

TEMPLATE = InstructionTemplate()
TURNS = [
    [Turn("Say it.", "It.")],
    [Turn("Add.", "Three", input="1 2")],
    [Turn("a", "b"), Turn("c", "d" * 9)],
    [Turn("q", "r")],
]


def test_the_template_puts_each_part_in_its_place() -> None:
    expected = "Be good.\n\n### Instruction:\nAdd {x}.\n\n### Input:\n1 2\n\n### Response:\n"
    assert TEMPLATE.prompt("Add {x}.", input="1 2", system="Be good.") == expected
    assert TEMPLATE.prompt("Add.") == "### Instruction:\nAdd.\n\n### Response:\n"
    assert TEMPLATES["plain"].prompt("Add.") == "Add.\n"
    thinking = InstructionTemplate(thinks=True)
    whole = thinking.prompt("Add.") + thinking.answer("3", thought="1 and 2")
    assert whole == "### Instruction:\nAdd.\n\n### Thought:\n1 and 2\n\n### Response:\n3"
    assert thinking.prompt("Add.").endswith("### Thought:\n")


def test_a_template_is_saved_with_the_model(tmp_path: Path) -> None:
    template = InstructionTemplate(instruction="Q: {instruction}\n", response="A: ")
    template.save(tmp_path)
    assert InstructionTemplate.load(tmp_path) == InstructionTemplate.load(tmp_path / TEMPLATE_FILE) == template
    assert InstructionTemplate.load("default") == TEMPLATE


@pytest.mark.parametrize("fields", [{"instruction": "no place"}, {"input": "{input}{input}"}, {"response": 3}, {"wat": "x"}])
def test_a_file_that_is_not_a_template_is_an_error(tmp_path: Path, fields: dict) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="is not an instruction template"):
        InstructionTemplate.load(path)
    with pytest.raises(DataError, match="fine-tune the model on instructions first"):
        InstructionTemplate.load(tmp_path)
    with pytest.raises(DataError, match="there is no template"):
        InstructionTemplate.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("fields", "turns"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, [Turn("Add.", "3", input="1 2")]),
        ({"instruction": "Add.", "input": None, "output": "3"}, [Turn("Add.", "3")]),
        ({"prompt": "Add.", "completion": "3"}, [Turn("Add.", "3")]),
        ({"prompt": "Add.", "thought": "well", "answer": "3"}, [Turn("Add.", "3", thought="well")]),
        (
            {"messages": [
                {"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"},
                {"role": "system", "content": ""},
                {"role": "user", "content": "V"}, {"role": "assistant", "content": "B"},
            ]},
            [Turn("U", "A", system="S"), Turn("V", "B")],
        ),
    ],
)  # fmt: skip
def test_every_form_of_record(fields: dict, turns: list[Turn]) -> None:
    assert conversation(fields) == turns


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "x"}, "neither instruction and output"),
        ({"instruction": "x"}, "no field 'output'"),
        ({"instruction": "x", "output": " "}, "'output' is empty"),
        ({"prompt": 1, "completion": "x"}, "'prompt' is int"),
        ({"messages": "x"}, "not a list"),
        ({"messages": [{"role": "user", "content": "x"}]}, "last message is not the assistant's"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "message 1: the role 'assistant'"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]}, "message 2: the role 'tool'"),
        ({"messages": [{"role": "user"}]}, "message 1: there is no field 'content'"),
    ],
)
def test_the_error_for_a_bad_record_says_why(fields: dict, message: str) -> None:
    with pytest.raises(BadRecord, match=message):
        conversation(fields)


def test_only_responses_and_their_ends_are_learned(small_tokenizer: GPT2Tokenizer) -> None:
    examples, n_cut, n_dropped = make_examples(TURNS, small_tokenizer, TEMPLATE, context=1000)
    assert (len(examples), n_cut, n_dropped) == (4, 0, 0)
    for turns, example in zip(TURNS, examples, strict=True):
        learned = [token for token, is_learned in zip(example.ids, example.is_learned, strict=True) if is_learned]
        expected = [id for turn in turns for id in [*small_tokenizer.encode(turn.response), small_tokenizer.eot_token_id]]
        assert learned == expected
        whole = "".join(TEMPLATE.prompt(t.instruction, input=t.input) + t.response + "<|endoftext|>" for t in turns)
        assert small_tokenizer.decode(example.ids) == whole


def test_long_examples_are_cut_or_dropped_and_counted(small_tokenizer: GPT2Tokenizer) -> None:
    lengths = [len(example.ids) for example in make_examples(TURNS, small_tokenizer, TEMPLATE, 1000)[0]]
    context = lengths[2] - 2
    cut, *counts = make_examples(TURNS, small_tokenizer, TEMPLATE, context)
    assert counts == [1, 0] and [len(example.ids) for example in cut] == [*lengths[:2], context, lengths[3]]
    kept, *counts = make_examples(TURNS, small_tokenizer, TEMPLATE, context, "drop")
    assert counts == [0, 1] and len(kept) == 3
    none, *counts = make_examples(TURNS, small_tokenizer, TEMPLATE, 5)
    assert counts == [0, 4] and none == []
    with pytest.raises(ConfigError, match="endoftext"):
        make_examples(TURNS, SimpleNamespace(eot_token_id=None), TEMPLATE, 5)


def test_all_turns_have_a_thought_or_none() -> None:
    thinking = [[Turn("a", "b", thought="c")]]
    assert with_thoughts(TEMPLATE, thinking).thinks and not with_thoughts(TEMPLATE, TURNS).thinks
    with pytest.raises(DataError, match="1 of 6 rows have a thought"):
        with_thoughts(TEMPLATE, [*thinking, *TURNS])


def test_the_loss_is_the_mean_over_the_learned_tokens(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    template = TEMPLATES["plain"]
    examples, _, _ = make_examples(TURNS, small_tokenizer, template, 40)
    config = TrainingConfig(batch_size=4, context=40)
    objective = InstructionTuning(examples, examples[:3], config)
    loss = objective.loss(small_model)
    assert isinstance(loss, ResponseLoss)

    def plain_loss(some) -> torch.Tensor:
        losses = []
        for example in some:
            logits = small_model(torch.tensor([example.ids[:-1]]))[0]
            each = F.cross_entropy(logits, torch.tensor(example.ids[1:]), reduction="none")
            losses.append(each[torch.tensor(example.is_learned[1:])])
        return torch.cat(losses).mean()

    batch = [torch.from_numpy(array) for array in objective.batches(0)]
    torch.testing.assert_close(loss(*batch), plain_loss(examples), rtol=1e-5, atol=1e-6)
    halves = [loss(*(tensor.chunk(2)[half] for tensor in batch)) for half in (0, 1)]
    torch.testing.assert_close(torch.stack(halves).mean(), plain_loss(examples), rtol=1e-5, atol=1e-6)
    ranks = [loss(*map(torch.from_numpy, objective.batches(0, rank, 2))) for rank in (0, 1)]
    torch.testing.assert_close(torch.stack(ranks).mean(), plain_loss(examples), rtol=1e-5, atol=1e-6)
    config = TrainingConfig(batch_size=2, context=40)
    evaluation = InstructionTuning(examples, examples[:3], config).evaluation
    values = [loss(*map(torch.from_numpy, evaluation(number))).item() for number in range(evaluation.count)]
    assert len(values) == 2 and np.mean(values) == pytest.approx(plain_loss(examples[:3]).item(), rel=1e-5)


def test_a_bos_token_begins_the_conversation_only(small_tokenizer: GPT2Tokenizer) -> None:
    with_bos = GPT2Tokenizer(replace(small_tokenizer.vocabulary, first_ids=(7,)))
    (example,), *_ = make_examples(TURNS[2:3], with_bos, TEMPLATES["plain"], 40)
    (plain,), *_ = make_examples(TURNS[2:3], small_tokenizer, TEMPLATES["plain"], 40)
    assert example.ids == [7, *plain.ids] and example.is_learned == [False, *plain.is_learned]


def test_the_first_token_is_no_target() -> None:
    """Nothing precedes it, so an example of three tokens has at most two targets, over which the loss is the mean."""
    example = Example([5, 6, 7], [True, True, True])
    objective = InstructionTuning([example], [example], TrainingConfig(batch_size=1, context=40))
    for batches in (objective.batches, objective.evaluation):
        inputs, targets, share = batches(0)
        assert (inputs.tolist(), targets.tolist(), share.tolist()) == ([[5, 6]], [[6, 7]], [0.5])
