"""Write a sampling rule of your own: a function from the logits of the next token to logits.

Shows the decode loop with `KVCache`, and two rules: `typical` keeps the tokens whose surprise is closest to the entropy
(Meister et al. 2022), and `without` keeps the tokens that do not contain a letter.

    python examples/sampling_rule.py "Once upon a time" --without e     # 2 seconds on one core
    python examples/sampling_rule.py "Once upon a time" --typical 0.5

Install the package first: `pip install -e .` in the repository.
"""

import argparse
from collections.abc import Callable, Sequence

import torch

from gpt2 import GPT2, KVCache
from gpt_encoder import Tokenizer, load_tokenizer

Rule = Callable[[torch.Tensor], torch.Tensor]  # logits (V,) to logits (V,); -inf excludes a token


def typical(mass: float) -> Rule:
    """Keep the fewest tokens whose surprise is closest to the entropy and whose probabilities reach `mass`."""

    def rule(logits: torch.Tensor) -> torch.Tensor:
        log_probs = logits.log_softmax(-1)
        probs = log_probs.exp()
        entropy = torch.special.entr(probs).sum()
        order = (-log_probs - entropy).abs().argsort()
        before = probs[order].cumsum(-1) - probs[order]  # the probability of all tokens that are closer
        return logits.index_fill(-1, order[before >= mass], -torch.inf)

    return rule


def without(letter: str, tokenizer: Tokenizer) -> Rule:
    """Exclude each token whose text contains `letter`, in lower or upper case."""
    letters = {letter.lower().encode(), letter.upper().encode()}
    banned = torch.tensor([id for id, text in tokenizer.token_bytes.items() if any(one in text for one in letters)])
    return lambda logits: logits.index_fill(-1, banned, -torch.inf)


@torch.inference_mode()
def generate(
    model: GPT2, prompt_ids: list[int], rules: Sequence[Rule], n_tokens: int, generator: torch.Generator | None
) -> list[int]:
    """Up to `n_tokens` new ids: drawn at random, or the most probable ones if `generator` is None."""
    cache, new_ids, next_ids = KVCache(model.config), [], prompt_ids
    for _ in range(min(n_tokens, model.config.n_positions - len(prompt_ids))):
        logits = model(torch.tensor([next_ids]), kv_cache=cache)[0, -1].double()  # (V,)
        for rule in rules:
            logits = rule(logits)
        token = int(logits.argmax() if generator is None else logits.softmax(-1).multinomial(1, generator=generator))
        if token in model.config.eos_token_ids:
            break
        new_ids.append(token)
        next_ids = [token]  # the cache holds the rest
    return new_ids


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate text with a sampling rule of your own.")
    parser.add_argument("prompt")
    parser.add_argument("--typical", type=float, metavar="MASS", help="between 0 and 1")
    parser.add_argument("--without", metavar="LETTER", help="one letter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_tokens", type=int, default=60)
    args = parser.parse_args()

    model, tokenizer = GPT2.from_pretrained("gpt2-tiny"), load_tokenizer("gpt2-tiny")
    rules = [without(args.without, tokenizer)] if args.without else []
    rules += [typical(args.typical)] if args.typical is not None else []
    generator, prompt_ids = torch.Generator().manual_seed(args.seed), tokenizer.encode(args.prompt)
    print(args.prompt + tokenizer.decode(generate(model, prompt_ids, rules, args.max_tokens, generator)))


if __name__ == "__main__":
    main()
