"""Train a small GPT-2 on characters, then sample text from it.

Shows `prepare` (text to token files), `Trainer` (the training loop) and `stream` (text as it is generated).

    python examples/train_characters.py                       # sentences that this file makes: 10 seconds on one core
    python examples/train_characters.py --data my_text.txt    # a text of your own

Install the package first: `pip install -e .` in the repository. `gpt2 train` does the same and has more options.
"""

import argparse
import random
from pathlib import Path

import torch

from gpt2 import GPT2, stream
from gpt2.training import Trainer, prepare
from gpt_config import GPT2Config, TrainingConfig

SUBJECTS = ("the cat", "a small dog", "the old man", "my sister")
VERBS = ("sees", "likes", "follows", "looks for")
OBJECTS = ("a red ball", "the moon", "some bread", "her friend")


def make_text(n_sentences: int, seed: int = 0) -> str:
    """Sentences with a fixed grammar, one per line. A model that has learned it writes no other words."""
    rng = random.Random(seed)
    sentences = (f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)}." for _ in range(n_sentences))
    return "\n".join(sentences) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small GPT-2 on characters, then sample text from it.")
    parser.add_argument("--data", type=Path, help="a text file; without it, sentences are made")
    parser.add_argument("--out", type=Path, default=Path("character_model"), help="folder for data and model")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    if args.data is None:
        args.data = args.out / "sentences.txt"
        args.data.write_text(make_text(4000), encoding="utf-8")

    # Encode the text. One tenth of it is kept apart to measure the validation loss on.
    data = prepare([args.data], args.out / "data", tokenizer="char")
    print(f"{len(data.train):,} tokens to train on, a vocabulary of {data.tokenizer.vocab_size} characters")

    torch.manual_seed(0)  # the initial weights
    model = GPT2(GPT2Config(vocab_size=data.tokenizer.vocab_size, n_positions=64, n_layer=2, n_head=4, n_embd=64))
    model.set_dropout(0.0)  # the model is too small to overfit this text
    config = TrainingConfig(
        context=64, batch_size=16, max_steps=args.steps, learning_rate=6e-3, min_learning_rate=3e-4,
        eval_interval=max(1, args.steps // 3), eval_batches=4, sample_tokens=0,
    )  # fmt: skip
    result = Trainer(model, data, config, args.out, is_quiet=True).train()
    print(f"best validation loss: {result.best_loss:.3f} nats per character")

    # The folder is an ordinary model folder: the weights with the lowest validation loss, and the tokenizer.
    best = GPT2.from_pretrained(args.out)
    prompt = args.data.read_text(encoding="utf-8")[:3]
    print(f"sample:\n{prompt}", end="")
    for piece in stream(best, data.tokenizer, prompt, max_new_tokens=120, do_sample=True, temperature=0.7, seed=0):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
