"""Find the sentence that is nearest to another one by the vectors of gpt2-tiny.

The vectors of all texts share a large part, so their mean is subtracted before the cosine is taken. GPT-2 was trained to
predict tokens, not to compare texts: it puts sentences about the same things together, whatever they say about them.

    python examples/nearest_texts.py                            # 2 seconds on one core
    python examples/nearest_texts.py "The bird was in a tree." "He ate a cake."

Install the package first: `pip install -e .` in the repository.
"""

import argparse

import torch

from gpt2 import GPT2
from gpt2.evaluation import embed
from gpt_encoder import load_tokenizer

SENTENCES = (
    "The dog ran after the ball in the park.",
    "A puppy chased a red ball on the grass.",
    "Mom made a big cake for the party.",
    "They ate cookies and cake with milk.",
    "The rain fell and the wind was cold.",
    "It was a stormy night with wind and rain.",
    "Tim was sad because his toy car was broken.",
    "Lily cried when her doll lost an arm.",
)


def nearest(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosine (N,) of each vector (N, C) with its nearest other one, after their mean is subtracted; and which it is."""
    centred = torch.nn.functional.normalize(vectors - vectors.mean(0), dim=1)
    cosines = (centred @ centred.T).fill_diagonal_(-2)  # (N, N); no text is its own neighbour
    return cosines.max(1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the sentence that is nearest to each sentence.")
    parser.add_argument("more", nargs="*", help="sentences of yours, besides those of this program")
    parser.add_argument("--layer", type=int, default=-1, help="0 for the embeddings, -1 for the last layer")
    args = parser.parse_args()

    model, tokenizer = GPT2.from_pretrained("gpt2-tiny"), load_tokenizer("gpt2-tiny")
    texts = [*SENTENCES, *args.more]
    vectors = embed(model, tokenizer, texts, layer=args.layer)  # (N, 256)
    for text, cosine, place in zip(texts, *nearest(vectors), strict=True):
        print(f"{text:46} {cosine:.2f}  {texts[place]}")


if __name__ == "__main__":
    main()
