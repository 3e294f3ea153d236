"""Teach gpt2-tiny to answer, with new special tokens around each turn, and then which of two answers is better (DPO).

Shows new tokens in an instruction template, and a preference run that begins with the result of an instruction run.

    python examples/tune_on_preferences.py    # half a minute on one core

Install the package first: `pip install -e .` in the repository. `gpt2 finetune` with `--task instruction` and with
`--task preference` does the same.
"""

import argparse
import json
from pathlib import Path

from gpt2 import GPT2, complete
from gpt2.finetuning.run import prepare_finetuning
from gpt2.finetuning.template import InstructionTemplate
from gpt2.generation.prompts import encode_prompt
from gpt2.training.progress import read_metrics
from gpt2.weights.tokenizer import load_tokenizer_for
from gpt_config import FinetuningConfig

ROLES = {"instruction": "<|user|>{instruction}", "response": "<|assistant|>"}
COLOURS = ("red", "blue", "green", "grey")


def write_lines(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def show(folder: Path) -> None:
    """Print the ids of a prompt, in which each role is one token, and the answer to it."""
    model, template = GPT2.from_pretrained(folder), InstructionTemplate.load(folder)
    tokenizer, prompt = load_tokenizer_for(model), template.prompt("Name the colour red.")
    print(f"  {prompt}: {encode_prompt(tokenizer, prompt)}")
    print(f"  answer:{complete(model, tokenizer, prompt, max_new_tokens=12)[0].text!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune gpt2-tiny on instructions, then on preferences.")
    parser.add_argument("--out", type=Path, default=Path("preferences"), help="folder for data and models")
    parser.add_argument("--epochs", type=float, default=12, help="of the instructions; half as many of the preferences")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    asked = [{"prompt": f"Name the colour {colour}.", "completion": f"It is {colour}."} for colour in COLOURS]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "I do not know."} for row in asked]
    questions = write_lines(args.out / "asked.jsonl", asked)
    preferred = write_lines(args.out / "pairs.jsonl", pairs)
    roles = write_lines(args.out / "roles.json", [ROLES])

    # Two new rows of the embedding, which begin as the mean of the others.
    common = {"batch_size": 4, "evaluations_per_epoch": 1, "patience": 0, "sample_tokens": 0}
    config = FinetuningConfig(
        task="instruction", template=str(roles), add_tokens=("<|user|>", "<|assistant|>"), epochs=args.epochs, **common
    )
    base = args.out / "answers"
    run = prepare_finetuning("gpt2-tiny", [questions], config, base, validation_data=[questions], is_quiet=True)
    print(f"instructions: validation loss {run.trainer.train().best_loss:.3f}")
    show(base)

    # The model of the start is the reference. Its template and its tokens stay.
    config = FinetuningConfig(task="preference", epochs=args.epochs / 2, beta=0.1, **common)
    run = prepare_finetuning(base, [preferred], config, args.out / "prefers", validation_data=[preferred], is_quiet=True)
    run.trainer.train()
    for line in (line for line in read_metrics(args.out / "prefers") if "margin" in line):
        print(f"preferences, step {line['step']}: accuracy {line['accuracy']:.2f}, margin {line['margin']:.3f}")
    show(args.out / "prefers")


if __name__ == "__main__":
    main()
