"""The loss of a student and its gradients equal autograd's on the formula in float64; its start is some of the layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gpt2.training import Trainer, TrainingData
from gpt2.training.distillation import Distillation, DistillationLoss, layers_of_student, start_from_teacher
from gpt2.training.loss import LanguageModelLoss
from gpt_config import ConfigError, GPT2Config
from gpt_test.conftest import random_model
from gpt_test.gpt2.training.conftest import SIZES, tiny_config

NONE = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
STUDENT = GPT2Config(vocab_size=31, **SIZES, **NONE)
TEACHER = GPT2Config(vocab_size=40, n_positions=20, n_embd=24, n_layer=1, n_head=3)  # wider, with rows that fill it up


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 1.0), (2.5, 0.3), (0.5, 0.0)])
def test_loss_and_gradients_equal_the_formula(temperature: float, share: float) -> None:
    student, teacher = random_model(STUDENT, 1, torch.float64), random_model(TEACHER, 2, torch.float64)
    x, y = torch.randint(31, (2, 90, 16), generator=torch.Generator().manual_seed(0))  # more tokens than a part has
    module = DistillationLoss(student, teacher, temperature, share).train()
    loss = module(x, y)
    (3 * loss).backward()
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    logits, guide = student(x).flatten(0, 1), teacher(x).flatten(0, 1)[:, :31].detach()
    own = F.cross_entropy(logits, y.flatten())
    taught = F.kl_div(
        F.log_softmax(logits / temperature, -1), F.log_softmax(guide / temperature, -1), log_target=True,
        reduction="batchmean",
    )  # fmt: skip
    expected = (1 - share) * own + share * temperature**2 * taught
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-9, msg=name)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    with torch.no_grad():
        assert module.eval()(x, y).item() == LanguageModelLoss(student)(x, y).item(), "evaluations measure the text's own"


def test_the_layers_of_a_student() -> None:
    assert layers_of_student(12, 6) == [0, 2, 4, 7, 9, 11], "those of DistilGPT-2"
    assert layers_of_student(6, 3) == [0, 2, 5] and layers_of_student(3, 1) == [0] and layers_of_student(2, 2) == [0, 1]
    teacher = random_model(GPT2Config(vocab_size=40, n_positions=20, n_embd=16, n_layer=3, n_head=2), 3)
    student = random_model(STUDENT, 4)
    assert start_from_teacher(student, teacher) == [0, 2]
    for ours, theirs in ((student.h[0], teacher.h[0]), (student.h[1], teacher.h[2]), (student.ln_f, teacher.ln_f)):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name])
    twin = random_model(GPT2Config(vocab_size=40, n_positions=20, n_embd=16, n_layer=3, n_head=2), 5)
    start_from_teacher(twin, teacher)
    ids = torch.arange(20)[None]
    assert torch.equal(twin(ids), teacher(ids))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_embd": 24}, "n_embd=16 is not that of the teacher, 24"),
        ({"n_head": 4}, "n_head=2 is not that of the teacher, 4"),
        ({"n_layer": 1}, "n_layer=2 is more than the teacher's 1"),
        ({"n_positions": 8}, "the student has 16 positions and the teacher 8: use a context of at most 8"),
        ({"vocab_size": 30}, "the teacher has 30 token ids and the student 31: use the teacher's tokenizer"),
    ],
)
def test_a_student_that_cannot_begin_with_the_layers(fields: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        start_from_teacher(random_model(STUDENT), random_model(GPT2Config(**({"vocab_size": 31, **SIZES} | fields))))


def test_the_parts_of_a_step_have_the_loss_of_the_whole(char_data: TrainingData, tmp_path: Path) -> None:
    vocab_size = char_data.train.vocab_size
    teacher = random_model(GPT2Config(vocab_size=vocab_size, **SIZES), 7)
    found = []
    for accumulation in (1, 4):
        config = tiny_config(accumulation=accumulation)
        student = random_model(GPT2Config(vocab_size=vocab_size, **SIZES, **NONE), 8)
        trainer = Trainer(student, Distillation(char_data, config, teacher), config, tmp_path)
        found.append([trainer.train_step() for trainer.step in range(2)])
        assert trainer.n_parameters == sum(p.numel() for p in student.parameters())
    assert found[0] == [pytest.approx(pair, rel=1e-5) for pair in found[1]]
    for changes, words in (({"vocab_size": 3}, "the teacher has 3 token ids"), ({"n_positions": 8}, "8 positions of the t")):
        small = random_model(GPT2Config(**({"vocab_size": vocab_size, **SIZES} | changes)))
        with pytest.raises(ConfigError, match=words):
            Trainer(student, Distillation(char_data, config, small), config, tmp_path)
