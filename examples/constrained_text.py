"""Constrain a text with `logits_processor`: a choice among given answers, or a regular expression that the text must match.

A processor is a function of the ids so far and the logits of the next token. It returns logits, with -inf for each token
that may not come next.

    python examples/constrained_text.py "The sun was hot, and Tom was" --choices " cold" " thirsty" " a big red dog"
    python examples/constrained_text.py "Friends, named" --regex " [A-Z][a-z]+ and [A-Z][a-z]+, (met|lived) in a [a-z ]+\\."

Each takes 3 seconds on one core. Install the package first: `pip install -e .` in the repository.
"""

import argparse
from collections.abc import Callable, Sequence

import regex
import torch
from torch import Tensor

from gpt2 import GPT2, complete
from gpt_encoder import Tokenizer, load_tokenizer

Processor = Callable[[Tensor, Tensor], Tensor]  # (ids (1, T), logits (1, V)) -> logits (1, V)


def only(tokens: Sequence[int], logits: Tensor) -> Tensor:
    """The logits of `tokens`, and -inf for all others."""
    allowed = torch.tensor(tokens)
    return torch.full_like(logits, -torch.inf).index_copy(-1, allowed, logits[:, allowed])


def choice(answers: Sequence[str], n_prompt: int, tokenizer: Tokenizer) -> Processor:
    """Continue with one of `answers`, token by token, and end after it."""
    ids_of_answers = [[*tokenizer.encode(answer), tokenizer.eot_token_id] for answer in answers]

    def process(ids: Tensor, logits: Tensor) -> Tensor:
        new = ids[0, n_prompt:].tolist()
        return only([answer[len(new)] for answer in ids_of_answers if answer[: len(new)] == new], logits)

    return process


def matching(pattern: str, n_prompt: int, tokenizer: Tokenizer) -> Processor:
    """Continue with a text that matches `pattern`, and end where it does if the model would end there."""
    expression, texts = regex.compile(pattern), {}
    for token, data in tokenizer.token_bytes.items():
        text = data.decode(errors="ignore")
        if text.encode() == data and token != tokenizer.eot_token_id:  # whole characters
            texts[token] = text

    def process(ids: Tensor, logits: Tensor) -> Tensor:
        before = tokenizer.decode(ids[0, n_prompt:])
        # A partial match is the beginning of a text that matches.
        tokens = [token for token, text in texts.items() if expression.fullmatch(before + text, partial=True)]
        ends = [tokenizer.eot_token_id] if expression.fullmatch(before) else []
        return only(tokens + ends, logits)

    return process


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate text under a constraint.")
    parser.add_argument("prompt")
    constraint = parser.add_mutually_exclusive_group(required=True)
    constraint.add_argument("--choices", nargs="+", metavar="TEXT")
    constraint.add_argument("--regex", metavar="PATTERN")
    args = parser.parse_args()

    model, tokenizer = GPT2.from_pretrained("gpt2-tiny"), load_tokenizer("gpt2-tiny")
    n_prompt = len(tokenizer.encode(args.prompt))
    make, constraint = (choice, args.choices) if args.choices else (matching, args.regex)
    processor = make(constraint, n_prompt, tokenizer)
    print(args.prompt + complete(model, tokenizer, args.prompt, max_new_tokens=40, logits_processor=processor)[0].text)


if __name__ == "__main__":
    main()
