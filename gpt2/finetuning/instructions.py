"""Instruction tuning: convert records to examples, and compute the loss on the responses. Reads no files.

Examples are padded on the right to the longest one of their batch; causal attention does not look there. Each example is a
separate row, so it does not see the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from gpt2.finetuning.records import BadRecord, Fields, text_of
from gpt2.finetuning.rows import LengthSortedRows, in_order_of_length, pad
from gpt2.finetuning.template import InstructionTemplate
from gpt2.generation.prompts import encode_prompt
from gpt2.model import GPT2
from gpt2.training.loss import sum_of_losses
from gpt2.training.objective import Batch, Objective, perplexity
from gpt_config.errors import ConfigError, DataError
from gpt_config.training_config import TrainingConfig
from gpt_encoder.interface import Tokenizer

_IGNORED = -100  # the target of a token that is not learned


class Turn(NamedTuple):
    """One exchange: the parts of the prompt, and the response that the model learns."""

    instruction: str
    response: str
    input: str = ""
    system: str = ""
    thought: str = ""


def conversation(fields: Fields) -> list[Turn]:
    """Return the turns of a record. BadRecord if the record has none of the known forms.

    They are Alpaca's (instruction, input, output), (prompt, completion), (prompt, thought, answer), and messages of system,
    user and assistant.
    """
    if "messages" in fields:
        return _messages(fields["messages"])
    if "instruction" in fields:
        given = text_of(fields, "input", default="")
        return [Turn(text_of(fields, "instruction"), text_of(fields, "output"), given)]
    if "answer" in fields:
        thought = text_of(fields, "thought", default="")
        return [Turn(text_of(fields, "prompt"), text_of(fields, "answer"), thought=thought)]
    if "completion" in fields:
        return [Turn(text_of(fields, "prompt"), text_of(fields, "completion"))]
    raise BadRecord(
        "it has neither instruction and output, nor prompt and completion or answer, nor messages "
        f"(it has {', '.join(map(repr, fields)) or 'nothing'})"
    )


def _messages(messages: object) -> list[Turn]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRecord("messages is not a list of objects with role and content")
    turns, waiting = [], {"system": "", "user": ""}
    for number, message in enumerate(messages, 1):
        try:
            role = message.get("role")
            content = text_of(message, "content", default="" if role == "system" else None)
        except BadRecord as error:
            raise BadRecord(f"message {number}: {error}") from None
        if role == "assistant" and waiting["user"]:
            turns.append(Turn(waiting["user"], content, system=waiting["system"]))
            waiting = {"system": "", "user": ""}
        elif role in ("system", "user") and not waiting[role]:
            waiting[role] = content
        else:
            raise BadRecord(f"message {number}: the role {role!r} is not expected here (order: system, user, assistant)")
    if not turns or waiting["user"] or waiting["system"]:
        raise BadRecord("the last message is not the assistant's: there is no response to learn")
    return turns


@dataclass(frozen=True)
class Example:
    """Token ids, and for each whether the model learns to predict it."""

    ids: list[int]
    is_learned: list[bool]


def with_thoughts(template: InstructionTemplate, conversations: Sequence[Sequence[Turn]]) -> InstructionTemplate:
    """Return `template`, with thoughts if the turns have thoughts. DataError if only some of the turns have one."""
    turns = [turn for turns in conversations for turn in turns]
    n_thoughts = sum(bool(turn.thought) for turn in turns)
    if 0 < n_thoughts < len(turns):
        raise DataError(f"{n_thoughts} of {len(turns)} rows have a thought: add one to all rows, or to none")
    return replace(template, thinks=n_thoughts > 0)


def make_examples(
    conversations: Sequence[Sequence[Turn]],
    tokenizer: Tokenizer,
    template: InstructionTemplate,
    context: int,
    too_long: str = "truncate",
) -> tuple[list[Example], int, int]:
    """Return (examples, number of examples cut to `context` tokens, number of examples dropped).

    The model learns the responses and the end-of-text token after each. An example that is cut has no end-of-text token at
    the cut. An example that is too long is dropped if no token to learn remains, or if `too_long` is "drop". ConfigError if
    the tokenizer has no end-of-text token.
    """
    if tokenizer.eot_token_id is None:
        raise ConfigError("the vocabulary has no <|endoftext|>, which has to end each response: use another model")
    examples, n_cut, n_dropped = [], 0, 0
    for turns in conversations:
        ids: list[int] = []
        is_learned: list[bool] = []
        for turn in turns:
            # Encoded separately, because a prompt is encoded without its response when the model is used.
            asked = template.prompt(turn.instruction, input=turn.input, system=turn.system)
            prompt = encode_prompt(tokenizer, asked, add_special_tokens=turn is turns[0])
            answer = template.answer(turn.response, thought=turn.thought)
            response = [*encode_prompt(tokenizer, answer, add_special_tokens=False), tokenizer.eot_token_id]
            ids += prompt + response
            is_learned += [False] * len(prompt) + [True] * len(response)
        if len(ids) > context and (too_long == "drop" or not any(is_learned[:context])):
            n_dropped += 1
            continue
        n_cut += len(ids) > context
        examples.append(Example(ids[:context], is_learned[:context]))
    return examples, n_cut, n_dropped


class ResponseLoss(nn.Module):
    """The mean cross-entropy, in nats, of the learned targets: those of `targets` (B, T) that are not negative.

    `share` (B,) is the same in each row: 1 / (mean number of learned targets per row of the whole batch). So the mean over
    the parts of a batch is the mean over its learned tokens, however they are distributed.
    """

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, targets: Tensor, share: Tensor) -> Tensor:
        hidden = self.model.hidden_states(input_ids)  # (B, T, C)
        learned = targets >= 0
        loss = sum_of_losses(hidden[learned], self.model.wte.weight, targets[learned])
        return loss * share[0] / len(targets)


class InstructionTuning(Objective):
    """Predict the responses to instructions."""

    def __init__(
        self,
        train: Sequence[Example],
        validation: Sequence[Example],
        config: TrainingConfig,
    ) -> None:
        if not train or not validation:
            raise DataError(
                f"{len(train)} training examples and {len(validation)} validation examples: each needs at least 1"
            )
        rows = LengthSortedRows([len(example.ids) for example in train], config.batch_size, config.seed)
        self.tokens_per_step = rows.mean_width * config.batch_size
        self.batches = _TrainingRows(train, rows)
        self.evaluation = _ValidationRows(validation, config.batch_size)

    def loss(self, model: GPT2) -> nn.Module:
        return ResponseLoss(model)

    def figures(self, loss: float) -> dict[str, float]:
        return {"perplexity": perplexity(loss)}


class _TrainingRows:
    def __init__(self, examples: Sequence[Example], rows: LengthSortedRows) -> None:
        self._examples, self._rows = examples, rows

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        return _batch([self._examples[row] for row in self._rows(step)], rank, world_size)


class _ValidationRows:
    def __init__(self, examples: Sequence[Example], batch_size: int) -> None:
        batches = in_order_of_length([len(example.ids) for example in examples], batch_size)
        self._batches = [[examples[row] for row in rows] for rows in batches]
        self.count = len(self._batches)
        self._n_learned = sum(_n_learned(example) for example in examples)

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return all rows in each process. With this share, the mean over batches is the mean over all learned tokens."""
        inputs, targets, share = _batch(self._batches[step], 0, 1)
        return inputs, targets, np.full_like(share, self.count * len(share) / self._n_learned)

    def share(self, step: int) -> float:
        """Return the same weight for all batches: the losses of the rows already have theirs."""
        return 1 / self.count


def _n_learned(example: Example) -> int:
    return sum(example.is_learned[1:])  # the first token is no target, because nothing precedes it


def _batch(examples: Sequence[Example], rank: int, world_size: int) -> Batch:
    mine = examples[rank::world_size]
    inputs = pad([example.ids[:-1] for example in mine], 0)
    targets = pad(
        [
            [token if learned else _IGNORED for token, learned in zip(example.ids[1:], example.is_learned[1:], strict=True)]
            for example in mine
        ],
        _IGNORED,
    )
    share = len(examples) / max(1, sum(map(_n_learned, examples)))
    return inputs, targets, np.full(len(mine), share, np.float32)
