"""Fine-tune gpt2-tiny to classify texts from a CSV file, then classify new texts.

Shows `prepare_finetuning`, the figures on the test part, and how a program loads and calls the result.

    python examples/finetune_classifier.py                        # reviews that this file makes: 10 seconds on one core
    python examples/finetune_classifier.py --data my_texts.csv    # a file with the columns "label" and "text"

Install the package first: `pip install -e .` in the repository. `gpt2 finetune --task classification` does the same.
"""

import argparse
import csv
import itertools
from pathlib import Path

from gpt2.finetuning.classification import classify
from gpt2.finetuning.classifier_files import load_classifier
from gpt2.finetuning.run import prepare_finetuning
from gpt2.weights.tokenizer import load_tokenizer_for
from gpt_config import FinetuningConfig

GOOD = ("funny", "warm", "clever", "beautiful", "lovely", "exciting")
BAD = ("boring", "slow", "silly", "ugly", "dull", "noisy")
FRAMES = ("The film was {}.", "I found it {}.", "What a {} story!", "My friend called it {}.", "So {}, all of it.")
NEW_TEXTS = ("A beautiful film, and so funny.", "It was slow. I fell asleep.")


def make_csv(path: Path) -> None:
    """Write a labelled text for each word and each frame."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("label", "text"))
        for label, words in (("good", GOOD), ("bad", BAD)):
            writer.writerows((label, frame.format(word)) for word, frame in itertools.product(words, FRAMES))


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune gpt2-tiny to classify texts, then classify new texts.")
    parser.add_argument("--data", type=Path, help='a CSV file with the columns "label" and "text"; without it, one is made')
    parser.add_argument("--from_pretrained", default="gpt2-tiny", help="the model to start from")
    parser.add_argument("--out", type=Path, default=Path("classifier"), help="folder for the classifier")
    parser.add_argument("--epochs", type=float, default=20)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    if args.data is None:
        args.data = args.out / "reviews.csv"
        make_csv(args.data)

    # A part of the rows is kept apart to test on, and another part to choose the best epoch by.
    config = FinetuningConfig(
        task="classification", epochs=args.epochs, batch_size=8, patience=0, test_fraction=0.2, validation_fraction=0.2
    )
    run = prepare_finetuning(args.from_pretrained, [args.data], config, args.out, is_quiet=True)
    run.trainer.train()
    figures = run.finish()
    print(f"accuracy {figures['accuracy']:.2f} on {figures['texts']} {figures['part']} texts")
    for label, row in zip(figures["labels"], figures["confusion"], strict=True):
        print(f"  {label:>8} taken for {dict(zip(figures['labels'], row, strict=True))}")

    # The folder is a model folder with a head. transformers loads it as GPT2ForSequenceClassification.
    classifier = load_classifier(args.out)
    tokenizer = load_tokenizer_for(classifier.transformer)
    ids = [tokenizer.encode(text)[: classifier.context] for text in NEW_TEXTS]
    for row, probabilities in sorted(classify(classifier, ids)):
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        print(f"{classifier.labels[best]} ({probabilities[best]:.2f}): {NEW_TEXTS[row]}")


if __name__ == "__main__":
    main()
