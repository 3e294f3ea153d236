"""GPT-2 in Python's standard library alone, to read from top to bottom and to check the other engines against.

    python -m gpt2.reference.python_gpt2 "Once upon a time" --from_pretrained FOLDER --max_new_tokens 20

Each section builds on the ones before: attention, the block, the model, the choice of the next token, and finally files and
the command. Read `python_layers` first: rows and matrices, and the functions of a layer. Numbers are Python floats. It knows
no batches and no training.

The docstrings cite these papers:
    [transformer]  Vaswani et al. 2017, "Attention Is All You Need"
    [gpt-1]        Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training"
    [gpt-2]        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"
    [layer norm]   Ba et al. 2016, "Layer Normalization"
    [gelu]         Hendrycks and Gimpel 2016, "Gaussian Error Linear Units (GELUs)"
    [tied]         Press and Wolf 2017, "Using the Output Embedding to Improve Language Models"
    [openai]       src/model.py and src/sample.py of OpenAI's repository gpt-2

T is the number of tokens in this call, S the number of cached tokens plus T, C = n_embd the number of channels per token,
H = n_head, D = C / H the number of channels per head, V = vocab_size.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gpt2.reference.python_layers import (
    ACTIVATIONS,
    Matrix,
    Row,
    add,
    dot,
    embedding,
    layer_norm,
    linear,
    masked_softmax,
    matmul,
    softmax,
)
from gpt2.reference.safetensors_reader import find_parameters, read_config, read_floats
from gpt2.weights.folder import locate_float_model
from gpt2.weights.safetensors_header import StoredTensor
from gpt_config.errors import CheckpointError, GPT2Error, InputError
from gpt_config.generation_config import GenerationConfig
from gpt_config.model_config import GPT2Config
from gpt_config.unfinished import unchanged

if TYPE_CHECKING:
    from gpt_encoder.interface import Tokenizer

# Keys are the names in the published files. The weight of a linear layer is a list of its columns, any other matrix a list
# of its rows, a vector one row.
Parameters = dict[str, Any]

# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of the tokens so far, (S, D) for each layer and head.

    A later token needs nothing else of the earlier ones, so with a cache only new tokens are computed.
    [openai] `past` and `present` in `model`.
    """

    def __init__(self, config: GPT2Config) -> None:
        self._rows: list[list[tuple[list[list[float]], list[list[float]]]]] = [
            [([], []) for _ in range(config.n_head)] for _ in range(config.n_layer)
        ]

    @property
    def length(self) -> int:
        """S: the number of tokens in the cache."""
        return len(self._rows[0][0][0])

    def append(
        self, layer: int, head: int, keys: list[list[float]], values: list[list[float]]
    ) -> tuple[list[list[float]], list[list[float]]]:
        """Add the keys and values (T, D) of new tokens. Returns those of all tokens, (S, D) each."""
        all_keys, all_values = self._rows[layer][head]
        all_keys += keys
        all_values += values
        return all_keys, all_values


def attention_head(queries: Matrix, keys: Matrix, values: Matrix, scale: float) -> list[list[float]]:
    """Queries (T, D), keys and values (S, D) to (T, D): softmax(Q K^T * scale) V, where no token sees a later one.

    The dot products of a token's query with the keys of all tokens up to itself are its scores. The softmax turns them into
    weights that sum to 1, and the result is the mean of the values with these weights. The queries belong to the last T of
    the S tokens. [transformer] section 3.2.1, equation 1, with scale = 1 / sqrt(D); [openai] `multihead_attn`.
    """
    past = len(keys) - len(queries)  # S - T
    weights = []  # (T, S)
    for t, query in enumerate(queries):
        scores = [dot(query, key) * scale for key in keys]  # (S,)
        weights.append(masked_softmax(scores, past + t + 1))
    return matmul(weights, values)


def attention_scale(config: GPT2Config, layer: int) -> float:
    """1 / sqrt(D), so that the scores do not grow with D. A config can choose another scale.

    [transformer] section 3.2.1, footnote 4. The published GPT-2 models use the default.
    """
    scale = 1 / math.sqrt(config.head_dim) if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


def multi_head_attention(
    x: Matrix, parameters: Parameters, config: GPT2Config, layer: int, cache: KVCache | None = None
) -> list[list[float]]:
    """(T, C) to (T, C): H heads, each on its own D channels, then a linear layer that mixes their results.

    One linear layer, `c_attn`, computes the queries, keys and values of all heads. Its output (T, 3C) is Q, K and V, of C
    channels each. In each of them, head h has the channels from h D to (h + 1) D.
    [transformer] section 3.2.2; [openai] `attn`.
    """
    C, D = config.n_embd, config.head_dim
    qkv = linear(x, parameters["attn.c_attn.weight"], parameters["attn.c_attn.bias"])  # (T, 3C)
    heads = []  # H of (T, D)
    for head in range(config.n_head):
        queries, keys, values = ([row[first : first + D] for row in qkv] for first in range(head * D, 3 * C, C))
        if cache is not None:
            keys, values = cache.append(layer, head, keys, values)
        heads.append(attention_head(queries, keys, values, attention_scale(config, layer)))
    joined = [[value for part in token for value in part] for token in zip(*heads, strict=True)]  # H of (T, D) to (T, C)
    return linear(joined, parameters["attn.c_proj.weight"], parameters["attn.c_proj.bias"])


# ---------------------------------------------------------------------------------------------------------------------
# The block and the model
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A GPT-2: its config and its parameters."""

    config: GPT2Config
    parameters: Parameters

    def layer(self, index: int) -> Parameters:
        """The parameters of block `index`, without the prefix `h.{index}.` in their names."""
        prefix = f"h.{index}."
        return {name.removeprefix(prefix): value for name, value in self.parameters.items() if name.startswith(prefix)}


def mlp(x: Matrix, parameters: Parameters, config: GPT2Config) -> list[list[float]]:
    """(T, C) to (T, C): gelu(x W_fc + b_fc) W_proj + b_proj, for each token separately.

    In between, a token has n_inner channels, by default 4C. [transformer] section 3.3, with the GELU of [gpt-1] section 4.1;
    [openai] `mlp`.
    """
    activation = ACTIVATIONS[config.activation_function]
    wide = linear(x, parameters["mlp.c_fc.weight"], parameters["mlp.c_fc.bias"])  # (T, 4C)
    active = [[activation(value) for value in row] for row in wide]
    return linear(active, parameters["mlp.c_proj.weight"], parameters["mlp.c_proj.bias"])


def norm(x: Matrix, parameters: Parameters, name: str, config: GPT2Config) -> list[list[float]]:
    """(T, C) to (T, C): `layer_norm` of each token, with the parameters `{name}.weight` and `{name}.bias`."""
    weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
    return [layer_norm(row, weight, bias, config.layer_norm_epsilon) for row in x]


def block(
    x: Matrix, parameters: Parameters, config: GPT2Config, layer: int, cache: KVCache | None = None
) -> list[list[float]]:
    """(T, C) to (T, C): x = x + attention(norm(x)), then x = x + mlp(norm(x)).

    GPT-2 normalises the input of each layer; the original transformer normalised the sum after each layer.
    [gpt-2] section 2.3; [openai] `block`.
    """
    x = add(x, multi_head_attention(norm(x, parameters, "ln_1", config), parameters, config, layer, cache))
    return add(x, mlp(norm(x, parameters, "ln_2", config), parameters, config))


def hidden_states(model: Model, ids: Sequence[int], cache: KVCache | None = None) -> list[list[float]]:
    """(T,) ids to (T, C): the sum of token and position embeddings, then all blocks, then a final norm.

    With a `cache`, the ids continue the tokens in it. InputError for an id or a position that the model does not have.
    [gpt-2] section 2.3; [openai] `model`.
    """
    config, parameters = model.config, model.parameters
    past = cache.length if cache is not None else 0
    check_ids(config, ids, past)
    positions = range(past, past + len(ids))
    x = add(embedding(parameters["wte.weight"], ids), embedding(parameters["wpe.weight"], positions))
    for layer in range(config.n_layer):
        x = block(x, model.layer(layer), config, layer, cache)
    return norm(x, parameters, "ln_f", config)


def check_ids(config: GPT2Config, ids: Sequence[int], past: int) -> None:
    """InputError unless the model has these ids and enough positions. Without this check, id -1 would mean the last row."""
    for token in ids:
        if not 0 <= token < config.vocab_size:
            raise InputError(
                f"token id {token} is outside the vocabulary of this model: ids go from 0 to {config.vocab_size - 1}; "
                "use the tokenizer that belongs to it"
            )
    if past + len(ids) > config.n_positions:
        raise InputError(
            f"{past + len(ids)} tokens are more than the {config.n_positions} positions of this model: cut the input"
        )


def tied_head(hidden: Row, token_embedding: Matrix) -> list[float]:
    """(C,) to logits (V,): logit_v = hidden . embedding of token v, the score of token v as the next token.

    The model uses its token embedding a second time here, so no separate output matrix is stored.
    [tied] section 3; [gpt-1] section 3.1, W_e; [openai] `model`.
    """
    return [dot(hidden, row) for row in token_embedding]


def forward(model: Model, ids: Sequence[int], cache: KVCache | None = None) -> list[list[float]]:
    """(T,) ids to (T, V): for each token, the logits of the token after it."""
    return [tied_head(row, model.parameters["wte.weight"]) for row in hidden_states(model, ids, cache)]


# ---------------------------------------------------------------------------------------------------------------------
# The next token
# ---------------------------------------------------------------------------------------------------------------------


def greedy(logits: Row) -> int:
    """(V,) to an id: the token with the largest logit, the smallest id if several are equal."""
    return max(range(len(logits)), key=logits.__getitem__)


def logits_to_probs(logits: Row, temperature: float) -> list[float]:
    """(V,) to (V,): softmax(logits / temperature). Below 1, likely tokens become more likely; above 1, less.

    The largest logit is subtracted first, so that the division cannot overflow to plus infinity. [openai] `sample_sequence`.
    """
    largest = max(logits)
    return softmax([(value - largest) / temperature for value in logits])


def sample(probs: Row, uniform: float) -> int:
    """(V,) to an id: the first token whose cumulative probability exceeds `uniform`, a random number from [0, 1).

    The tokens divide the interval from 0 to 1 into parts as long as their probabilities; `uniform` lies in one of them.
    """
    cumulative = list(accumulate(probs))
    total = cumulative[-1]  # 1, apart from rounding
    return bisect_right(cumulative, min(uniform * total, math.nextafter(total, 0.0)))


def generate(
    model: Model,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Yield the tokens after the prompt, up to and including the end-of-text token. Temperature 0 means greedy.

    Only ids below `vocab_size` are chosen, because many models are padded to more rows than there are tokens. A text that
    no longer fits loses its older half, and the cache is computed again, because the rest of the text has new positions.
    """
    config = model.config
    options = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=True, temperature=temperature, seed=seed)
    generator = random.Random(options.seed)
    ids = start_of(config, prompt_ids)
    cache, new = KVCache(config), ids[-config.n_positions :]
    for _ in range(options.max_new_tokens):
        if cache.length + len(new) > config.n_positions:
            cache, new = KVCache(config), ids[-max(1, config.n_positions // 2) :]
        last = hidden_states(model, new, cache)[-1]
        token = choose(tied_head(last, model.parameters["wte.weight"])[:vocab_size], options, generator)
        yield token
        if token in config.eos_token_ids:
            return
        ids, new = [*ids, token], [token]


def start_of(config: GPT2Config, prompt_ids: Sequence[int]) -> list[int]:
    """The ids of the prompt, or the bos_token_id if the prompt is empty. InputError if the model has none."""
    if not prompt_ids and config.bos_token_id is None:
        raise InputError("the prompt is empty and this model has no bos_token_id to start from: give it a token")
    return list(prompt_ids) or [config.bos_token_id or 0]


def choose(logits: Row, options: GenerationConfig, generator: random.Random) -> int:
    """The next token: the one with the largest logit, or a random one. CheckpointError if a logit is NaN or infinite."""
    if not math.isfinite(sum(logits)):
        raise CheckpointError("the model computes NaN or infinite logits: its weights are damaged; download them again")
    if options.greedy:
        return greedy(logits)
    return sample(logits_to_probs(logits, options.temperature), generator.random())


# ---------------------------------------------------------------------------------------------------------------------
# Files and the command
# ---------------------------------------------------------------------------------------------------------------------


def load_model(name_or_folder: str | os.PathLike[str]) -> Model:
    """Load a folder with config.json and model.safetensors, or a shipped or cached model by name.

    A number takes 4 bytes in memory if the file stores it in 2 or 4 bytes, and 8 bytes if the file stores it in 8.
    """
    folder = locate_float_model(name_or_folder)
    with unchanged(folder):
        config = read_config(folder)
        tensors = find_parameters(folder, config)
        return Model(config, {name: read_parameter(name, tensor) for name, tensor in tensors.items()})


def read_parameter(name: str, tensor: StoredTensor) -> Any:
    """A vector as one array, an embedding as a list of its rows, the weight of a linear layer as a list of its columns."""
    numbers = read_floats(tensor)
    if len(tensor.shape) == 1:
        return numbers
    n_rows, n_columns = tensor.shape
    if name in ("wte.weight", "wpe.weight"):
        return [numbers[row * n_columns : (row + 1) * n_columns] for row in range(n_rows)]
    return [numbers[column::n_columns] for column in range(n_columns)]


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = _OneLineParser(prog="python -m gpt2.reference.python_gpt2", description="Continue PROMPT, in plain Python.")
    parser.add_argument("prompt")
    parser.add_argument("--from_pretrained", metavar="NAME", default="gpt2", help="a folder, a shipped model or a hub name")
    parser.add_argument("--max_new_tokens", type=int, default=20)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--seed", type=int, help="makes samples repeatable")
    return parser.parse_args(arguments)


def write_continuation(options: argparse.Namespace) -> None:
    """Print the prompt and its continuation, token by token."""
    from gpt_encoder import StreamDecoder  # imported here, because only the command needs a tokenizer

    how = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "seed": options.seed}
    GenerationConfig(**how)  # reports invalid options before the weights are read
    folder = locate_float_model(options.from_pretrained)
    tokenizer = tokenizer_of(folder)
    prompt_ids, text = tokenizer.encode(options.prompt), StreamDecoder(tokenizer)
    model = load_model(folder)
    if len(prompt_ids) > model.config.n_positions:
        n = model.config.n_positions
        print(f"warning: the prompt has {len(prompt_ids)} tokens, and the model sees only the last {n}", file=sys.stderr)
    print(options.prompt, end="", flush=True)
    for token in generate(model, prompt_ids, vocab_size=tokenizer.vocab_size, **how):
        if token not in model.config.eos_token_ids:
            print(text.push(token), end="", flush=True)
    print(text.flush())


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`. If it has none and the vocabulary has the size of OpenAI's, OpenAI's tokenizer is used."""
    from gpt_encoder.tokenizer import has_tokenizer, load_tokenizer

    is_openai = not has_tokenizer(folder) and read_config(folder).vocab_size == GPT2Config().vocab_size
    return load_tokenizer("gpt2" if is_openai else folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 on success and 1 after an error, which is printed as one line on stderr."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show is replaced by "?"
    try:
        write_continuation(parse_arguments(arguments))
    except GPT2Error as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C, or the program that reads the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's flush at exit would print an error
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
