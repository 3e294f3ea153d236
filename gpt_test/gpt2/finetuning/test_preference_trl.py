"""DPO beside trl's DPOTrainer: it counts the same tokens, and loss, rewards, accuracy, margins and gradients are equal.

trl is no part of requirements-dev.txt, because it needs datasets and accelerate: `pip install trl`. Written for trl 1.16.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpt2 import GPT2
from gpt2.finetuning.instructions import Turn
from gpt2.finetuning.preference import DPOLoss, EncodedPair, Pair, encode_pairs, reference_log_probs
from gpt2.finetuning.template import InstructionTemplate
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import random_model, transformers_twin

pytestmark = pytest.mark.slow

BETA = 0.3
PAIRS = [
    Pair([Turn("go home", "yes, now")], [Turn("go home", "no")]),
    Pair([Turn("the sea", "boats")], [Turn("the sea", "a cat and a fish")]),
    Pair([Turn("a", "b"), Turn("c", "the cat")], [Turn("a", "b"), Turn("c", "the dog")]),
    Pair([Turn("where?", "far away", system="the old dog")], [Turn("where?", "far", system="the old dog")]),
]


def messages(turns: list[Turn]) -> list[dict[str, str]]:
    found = []
    for turn in turns:
        found += [{"role": "system", "content": turn.system}] if turn.system else []
        found += [{"role": "user", "content": turn.instruction}, {"role": "assistant", "content": turn.response}]
    return found


def as_messages(pair: Pair, template: InstructionTemplate) -> dict[str, object]:
    chosen, rejected = map(messages, pair)
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def as_texts(pair: Pair, template: InstructionTemplate) -> dict[str, object]:
    [chosen], [rejected] = pair
    prompt = str(template.prompt(chosen.instruction, system=chosen.system))
    return {"prompt": prompt, "chosen": chosen.response, "rejected": rejected.response}


class Trl:
    """trl's trainer of a model, with the batch that it makes of `rows`."""

    def __init__(self, twin: torch.nn.Module, folder: Path, rows: list[dict[str, object]]) -> None:
        trl = pytest.importorskip("trl", reason="trl is not installed (pip install trl)")
        datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.eos_token
        options = trl.DPOConfig(
            output_dir=str(folder / "trl"), beta=BETA, report_to="none", use_cpu=True, bf16=False, max_length=None,
            per_device_train_batch_size=len(rows), disable_tqdm=True,
        )  # fmt: skip
        self._trainer = trl.DPOTrainer(
            model=twin, ref_model=copy.deepcopy(twin), args=options, processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(rows),
        )  # fmt: skip
        self._trainer.precompute_ref_logps = True  # both sides have the same reference
        prepared = self._trainer.train_dataset
        self.inputs = self._trainer.data_collator([prepared[place] for place in range(len(rows))])

    def loss(self, model: object, reference: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss, and trl's figures: the mean rewards, their accuracy and margin."""
        given = {"ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1]}
        self._trainer.model.train()  # trl disables dropout
        metrics = self._trainer._metrics["train"]
        metrics.clear()
        loss = self._trainer._compute_loss(model, {**self.inputs, **given}, False)
        return loss, {name.removeprefix("rewards/"): values[0] for name, values in metrics.items() if "rewards" in name}


def in_float64(twin: torch.nn.Module):
    """A model that gives trl log-probabilities in float64. trl's own head computes in float32, whatever the model is."""

    def call(input_ids, attention_mask, labels, **_):
        logits = twin(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        labels = labels[:, 1:]
        log_probs = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
        log_probs = log_probs.masked_fill(labels < 0, 0)
        nothing = torch.zeros_like(log_probs).detach()
        return SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())

    return call


def ours(model: GPT2, pairs: list[EncodedPair], reference: torch.Tensor) -> tuple[float, dict[str, float]]:
    """The loss of all pairs as a batch, with its gradients in `model`, and the figures of the same pairs."""
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    width = max(len(side.ids) for side in sides) - 1
    ids, targets = np.zeros((len(sides), width), np.int64), np.full((len(sides), width), -100)
    for row, side in enumerate(sides):
        ids[row, : len(side.ids) - 1] = side.ids[:-1]
        counted = np.flatnonzero(side.is_learned[1:])
        targets[row, counted] = np.array(side.ids)[counted + 1]
    batch = [torch.from_numpy(side.reshape(len(pairs), -1)) for side in (ids, targets)]
    module = DPOLoss(model, BETA)
    weights = torch.ones(len(pairs), dtype=reference.dtype)
    loss = module.train()(*batch, reference, weights)
    loss.backward()
    module.eval()(*batch, reference, weights)
    return loss.item(), module.figures()


@pytest.mark.parametrize("form", [as_messages, as_texts])
@pytest.mark.parametrize(("dtype", "within", "apart"), [(torch.float64, 1e-9, 1e-12), (torch.float32, 2e-5, 1e-5)])
def test_dpo_equals_trl(
    small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path, form, dtype: torch.dtype, within: float, apart: float
) -> None:
    """`apart` is for figures that are differences of log-probabilities, which may be near 0."""
    base = random_model(small_model.config, 1, dtype)
    base.set_dropout(0.0)
    base.save_pretrained(tmp_path, tokenizer=small_tokenizer)
    template = InstructionTemplate.load("plain")
    template.save(tmp_path)
    pairs = PAIRS if form is as_messages else [pair for pair in PAIRS if len(pair.chosen) == 1]
    encoded, _ = encode_pairs(pairs, small_tokenizer, template, 40)
    reference = torch.from_numpy(reference_log_probs(base, encoded, 2)).to(dtype)
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    twin = transformers_twin(model)
    theirs = Trl(twin, tmp_path, [form(pair, template) for pair in pairs])

    ids, mask = theirs.inputs["input_ids"], theirs.inputs["completion_mask"]
    for row, side in enumerate([*(pair.chosen for pair in encoded), *(pair.rejected for pair in encoded)]):
        length = int(theirs.inputs["attention_mask"][row].sum())
        assert ids[row, :length].tolist() == side.ids, "the tokens, with the end of the text"
        assert mask[row].tolist() == [*map(int, side.is_learned), *[0] * (ids.shape[1] - length)], "those that count"

    expected, rewards = theirs.loss(in_float64(twin) if dtype == torch.float64 else twin, reference)
    expected.backward()
    loss, figures = ours(model, encoded, reference)
    assert loss == pytest.approx(expected.item(), rel=within)
    assert figures["accuracy"] == pytest.approx(rewards["accuracies"], rel=1e-6)
    assert figures["margin"] == pytest.approx(rewards["margins"], rel=within, abs=apart)
    changes = torch.from_numpy(reference_log_probs(model, encoded, 2)) - reference
    assert BETA * changes.mean(0).numpy() == pytest.approx([rewards["chosen"], rewards["rejected"]], rel=within, abs=apart)
    found, wanted = dict(model.named_parameters()), dict(twin.transformer.named_parameters())
    assert found.keys() == wanted.keys()
    largest = max(parameter.grad.abs().max().item() for parameter in wanted.values())
    for name, parameter in found.items():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=within, atol=within * largest, msg=name)


def test_a_prompt_that_merges_with_the_response(small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    """trl encodes them together and counts the merged token; here the prompt is encoded as it is when the model is used."""
    asked, wanted, other = "look at t", "he cat", "he dog"
    small_model.save_pretrained(tmp_path, tokenizer=small_tokenizer)
    theirs = Trl(transformers_twin(small_model), tmp_path, [{"prompt": asked, "chosen": wanted, "rejected": other}])
    template = InstructionTemplate(instruction="{instruction}", response="")
    [pair], _ = encode_pairs([Pair([Turn(asked, wanted)], [Turn(asked, other)])], small_tokenizer, template, 40)
    alone, together = small_tokenizer.encode(asked), small_tokenizer.encode(asked + wanted)
    assert together[: len(alone)] != alone, "the last token of the prompt merges"
    end = [small_tokenizer.eot_token_id]
    assert pair.chosen.ids == [*alone, *small_tokenizer.encode(wanted), *end]
    assert pair.chosen.is_learned.index(True) == len(alone)
    length = int(theirs.inputs["attention_mask"][0].sum())
    assert theirs.inputs["input_ids"][0, :length].tolist() == together + end
    assert theirs.inputs["completion_mask"][0].tolist().index(1) == len(alone) - 1
