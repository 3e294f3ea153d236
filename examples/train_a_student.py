"""Distil gpt2-tiny into a student with half of its layers, with Muon and a learning rate that falls only at the end.

Shows `start_from_teacher`, the objective `Distillation`, and `optimizer` and `schedule` of `TrainingConfig`. The text is the
teacher's own, so no file is needed.

    python examples/train_a_student.py    # half a minute on one core

Install the package first: `pip install -e .` in the repository. `gpt2 train` with `--teacher gpt2-tiny`, `--optimizer
muon` and `--schedule wsd` does the same.
"""

import argparse
import dataclasses
from pathlib import Path

from gpt2 import GPT2, complete
from gpt2.training import Trainer, prepare
from gpt2.training.distillation import Distillation, start_from_teacher
from gpt2.training.outputs import text_outputs
from gpt_config import TrainingConfig
from gpt_encoder import load_tokenizer

ANIMALS, KINDS = ("dog", "cat", "bird", "bear", "fox"), ("big", "little", "sad", "funny")


def main() -> None:
    parser = argparse.ArgumentParser(description="Distil gpt2-tiny into a model with half of its layers.")
    parser.add_argument("--out", type=Path, default=Path("student"), help="folder for data and student")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()

    teacher, tokenizer = GPT2.from_pretrained("gpt2-tiny"), load_tokenizer("gpt2-tiny")
    prompts = [f"Once upon a time, there was a {kind} {animal}." for animal in ANIMALS for kind in KINDS]
    told = complete(teacher, tokenizer, prompts, max_new_tokens=100, do_sample=True, temperature=0.8, seed=0)
    args.out.mkdir(parents=True, exist_ok=True)
    files = {"validation.txt": told[: len(KINDS)], "train.txt": told[len(KINDS) :]}  # the first animal is held out
    for name, stories in files.items():
        text = "\n<|endoftext|>\n".join(story.prompt + story.text for story in stories)
        (args.out / name).write_text(text, encoding="utf-8")
    validation, train = (args.out / name for name in files)
    data = prepare([train], args.out / "data", tokenizer="gpt2-tiny", validation_data=[validation], workers=1)

    student = GPT2(dataclasses.replace(teacher.config, n_layer=teacher.config.n_layer // 2))
    print(f"the student begins with the layers {start_from_teacher(student, teacher)} of {teacher.config.n_layer}")

    # Muon trains the matrices of the layers, AdamW the rest. The rate stays after the warm-up, and falls in the last fifth.
    config = TrainingConfig(
        context=64, batch_size=8, max_steps=args.steps, optimizer="muon", learning_rate=1e-3, schedule="wsd",
        decay_steps=args.steps // 5, teacher_share=0.5, temperature_of_teacher=2.0, eval_interval=args.steps,
        sample_tokens=0,
    )  # fmt: skip
    objective, outputs = Distillation(data, config, teacher), text_outputs(tokenizer, config)
    trainer = Trainer(student, objective, config, args.out, outputs=outputs, is_quiet=True)
    print(f"validation loss before: {trainer.validation_loss():.3f}")
    result = trainer.train()
    print(f"validation loss after {result.step} steps: {result.best_loss:.3f}")

    # The folder is an ordinary model folder.
    [story] = complete(GPT2.from_pretrained(args.out), tokenizer, prompts[:1], max_new_tokens=30)
    print(story.prompt + story.text)


if __name__ == "__main__":
    main()
