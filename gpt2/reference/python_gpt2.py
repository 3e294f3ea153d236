"""GPT-2 in the standard library alone, numbers as Python floats: to be read from top to bottom, and to check the others.

    python -m gpt2.reference.python_gpt2 "Once upon a time" --from_pretrained FOLDER --max_new_tokens 20

The order is that of the ideas: rows and matrices, the functions of a layer, attention, the block, the model, the choice of a
token, and at the end files and the command. It knows nothing of batches or training.

Papers, as the docstrings cite them:
    [transformer]  Vaswani et al. 2017, "Attention Is All You Need"
    [gpt-1]        Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training"
    [gpt-2]        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"
    [layer norm]   Ba et al. 2016, "Layer Normalization"
    [gelu]         Hendrycks and Gimpel 2016, "Gaussian Error Linear Units (GELUs)"
    [tied]         Press and Wolf 2017, "Using the Output Embedding to Improve Language Models"
    [openai]       src/model.py and src/sample.py of OpenAI's repository gpt-2

T is the number of tokens of this call, S those and the cached ones, C = n_embd the channels of a token, H = n_head,
D = C / H the channels of a head, V = vocab_size.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gpt2.reference.safetensors_reader import StoredTensor, find_parameters, read_config, read_floats
from gpt2.weights.folder import locate_float_model
from gpt_config.errors import CheckpointError, GPT2Error, InputError
from gpt_config.generation_config import GenerationConfig
from gpt_config.model_config import GPT2Config

if TYPE_CHECKING:
    from gpt_encoder.interface import Tokenizer

# A row is a list, or an `array` where it holds weights: there a number takes 4 bytes, and in a list 32.
Row = Sequence[float]
Matrix = Sequence[Row]
# By the names of the published files. A weight of a linear layer is held as its columns, other matrices as their rows.
Parameters = dict[str, Any]

# ---------------------------------------------------------------------------------------------------------------------
# Rows and matrices
# ---------------------------------------------------------------------------------------------------------------------


def _sum_of_products(a: Row, b: Row) -> float:
    total: float = sum(map(mul, a, b))
    return total


# The dot product, in which nearly all the time is spent: sum_i a_i b_i of two rows of one length. No loop of Python's own
# runs here, for each of its steps would cost more than the product. Python 3.12 has it as a function.
dot: Callable[[Row, Row], float] = getattr(math, "sumprod", _sum_of_products)


def transpose(a: Matrix) -> list[list[float]]:
    """(n, m) to (m, n): out[j][i] = a[i][j]."""
    return [list(column) for column in zip(*a, strict=True)]


def matmul(a: Matrix, b: Matrix) -> list[list[float]]:
    """(n, k) times (k, m) is (n, m): out[i][j] = sum_l a[i][l] b[l][j], the dot product of a row and a column."""
    columns = transpose(b)
    return [[dot(row, column) for column in columns] for row in a]


def add(a: Matrix, b: Matrix) -> list[list[float]]:
    """(n, m) plus (n, m): out[i][j] = a[i][j] + b[i][j].

    Here it is the residual connection: a layer changes the stream by what it adds to it ([transformer] section 3.1).
    """
    return [[x + y for x, y in zip(row_a, row_b, strict=True)] for row_a, row_b in zip(a, b, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# The functions of a layer
# ---------------------------------------------------------------------------------------------------------------------


def softmax(x: Row) -> list[float]:
    """(n,) to (n,): out_i = exp(x_i) / sum_j exp(x_j), positive numbers that sum to 1.

    The largest x is taken from all first. That cancels in the quotient, and no exponential can overflow.
    [transformer] section 3.2.1; [openai] `softmax`.
    """
    largest = max(x)
    exponentials = [math.exp(value - largest) for value in x]
    total = sum(exponentials)
    return [value / total for value in exponentials]


def masked_softmax(scores: Row, n_visible: int) -> list[float]:
    """(S,) to (S,): the softmax of the first `n_visible` scores, and 0 for the rest, which belong to later tokens.

    The papers put minus infinity in place of hidden scores, and exp(-infinity) = 0: the same numbers.
    [transformer] section 3.2.3; [openai] `mask_attn_weights`.
    """
    return softmax(scores[:n_visible]) + [0.0] * (len(scores) - n_visible)


def layer_norm(x: Row, weight: Row, bias: Row, epsilon: float) -> list[float]:
    """(C,) to (C,): out_i = (x_i - mean) / sqrt(variance + epsilon) * weight_i + bias_i, over the channels of one token.

    The variance is the mean of the squared distances from the mean (divided by C, not by C - 1).
    [layer norm] section 3; [openai] `norm`.
    """
    mean = sum(x) / len(x)
    centred = [value - mean for value in x]
    scale = 1 / math.sqrt(dot(centred, centred) / len(x) + epsilon)
    return [value * scale * w + b for value, w, b in zip(centred, weight, bias, strict=True)]


def gelu(x: float) -> float:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): near x where x is large, near 0 where it is very negative.

    It approximates x times the probability that a normal random number is below x. [gelu] section 2; [openai] `gelu`.
    """
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def exact_gelu(x: float) -> float:
    """x Phi(x) = 0.5 x (1 + erf(x / sqrt(2))), what `gelu` approximates. [gelu] section 2; no published GPT-2 uses it."""
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def relu(x: float) -> float:
    """max(x, 0). [transformer] section 3.3; no published GPT-2 uses it."""
    return max(x, 0.0)


# By the names they have in a config.json; the first three are one function.
ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "gelu_new": gelu,
    "gelu_pytorch_tanh": gelu,
    "gelu_fast": gelu,
    "gelu": exact_gelu,
    "relu": relu,
}


def embedding(table: Matrix, ids: Sequence[int]) -> list[Row]:
    """A row of `table` (V, C) for each id: (T, C). [transformer] section 3.4; [openai] `model`, its `tf.gather`."""
    return [table[token] for token in ids]


def linear(x: Matrix, columns: Matrix, bias: Row) -> list[list[float]]:
    """(T, n_in) to (T, n_out): out = x W + bias, for each token on its own.

    W (n_in, n_out) comes as its `columns` (n_out, n_in), since each number of the output reads one of them.
    [transformer] section 3.3; [openai] `conv1d`.
    """
    if len(x) == 1:
        return [[dot(x[0], column) + b for column, b in zip(columns, bias, strict=True)]]
    out = []
    for column, b in zip(columns, bias, strict=True):
        weights = list(column)  # an array makes a new float at every visit, a list keeps those it has
        out.append([dot(row, weights) + b for row in x])
    return transpose(out)


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of the tokens so far, (S, D) for each layer and head: later tokens need no others of their results.

    [openai] `past` and `present` in `model`.
    """

    def __init__(self, config: GPT2Config) -> None:
        self._rows: list[list[tuple[list[list[float]], list[list[float]]]]] = [
            [([], []) for _ in range(config.n_head)] for _ in range(config.n_layer)
        ]

    @property
    def length(self) -> int:
        """S: how many tokens are in it."""
        return len(self._rows[0][0][0])

    def append(
        self, layer: int, head: int, keys: list[list[float]], values: list[list[float]]
    ) -> tuple[list[list[float]], list[list[float]]]:
        """Add keys and values (T, D) of new tokens; returns those of all tokens (S, D)."""
        all_keys, all_values = self._rows[layer][head]
        all_keys += keys
        all_values += values
        return all_keys, all_values


def attention_head(queries: Matrix, keys: Matrix, values: Matrix, scale: float) -> list[list[float]]:
    """Queries (T, D), keys and values (S, D) to (T, D): softmax(Q K^T * scale) V, where no token sees a later one.

    A token's query is compared with the keys of all tokens up to itself; the softmax makes shares of these scores, and the
    result is the mean of the values, weighted by the shares. The queries belong to the last T of the S tokens.
    [transformer] section 3.2.1, equation 1, with scale = 1 / sqrt(D); [openai] `multihead_attn`.
    """
    past = len(keys) - len(queries)
    shares = []
    for t, query in enumerate(queries):
        scores = [dot(query, key) * scale for key in keys]
        shares.append(masked_softmax(scores, past + t + 1))
    return matmul(shares, values)


def attention_scale(config: GPT2Config, layer: int) -> float:
    """1 / sqrt(D), so that scores do not grow with D, unless the config says otherwise.

    [transformer] section 3.2.1, footnote 4. Published GPT-2s have the defaults.
    """
    scale = 1 / math.sqrt(config.head_dim) if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


def multi_head_attention(
    x: Matrix, parameters: Parameters, config: GPT2Config, layer: int, cache: KVCache | None = None
) -> list[list[float]]:
    """(T, C) to (T, C): H heads side by side, each on its own D channels, then a linear layer that mixes them.

    One linear layer, `c_attn`, makes the queries, keys and values of all heads: (T, 3C) is Q, K, V of C channels each, and
    in each of them the channels from h D to (h + 1) D are head h. [transformer] section 3.2.2; [openai] `attn`.
    """
    C, D = config.n_embd, config.head_dim
    qkv = linear(x, parameters["attn.c_attn.weight"], parameters["attn.c_attn.bias"])
    heads = []
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
    """A GPT-2: its shape and its numbers."""

    config: GPT2Config
    parameters: Parameters

    def layer(self, index: int) -> Parameters:
        """The parameters of one block, without the `h.{index}.` before their names."""
        prefix = f"h.{index}."
        return {name.removeprefix(prefix): value for name, value in self.parameters.items() if name.startswith(prefix)}


def mlp(x: Matrix, parameters: Parameters, config: GPT2Config) -> list[list[float]]:
    """(T, C) to (T, C): gelu(x W_fc + b_fc) W_proj + b_proj, for each token on its own; inside, 4C channels.

    [transformer] section 3.3, with [gpt-1] section 4.1's GELU; [openai] `mlp`.
    """
    activation = ACTIVATIONS[config.activation_function]
    wide = linear(x, parameters["mlp.c_fc.weight"], parameters["mlp.c_fc.bias"])  # (T, 4C)
    active = [[activation(value) for value in row] for row in wide]
    return linear(active, parameters["mlp.c_proj.weight"], parameters["mlp.c_proj.bias"])


def norm(x: Matrix, parameters: Parameters, name: str, config: GPT2Config) -> list[list[float]]:
    """(T, C) to (T, C): `layer_norm` of each token, with the weight and bias of that name."""
    weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
    return [layer_norm(row, weight, bias, config.layer_norm_epsilon) for row in x]


def block(
    x: Matrix, parameters: Parameters, config: GPT2Config, layer: int, cache: KVCache | None = None
) -> list[list[float]]:
    """(T, C) to (T, C): x + attention(norm(x)), then the same with the MLP.

    The norms stand before the layers, not behind them as in the first transformer. [gpt-2] section 2.3; [openai] `block`.
    """
    x = add(x, multi_head_attention(norm(x, parameters, "ln_1", config), parameters, config, layer, cache))
    return add(x, mlp(norm(x, parameters, "ln_2", config), parameters, config))


def hidden_states(model: Model, ids: Sequence[int], cache: KVCache | None = None) -> list[list[float]]:
    """(T,) ids to (T, C): token and position embeddings added, then all blocks, then a last norm.

    With a `cache`, the ids follow the tokens in it. InputError for an id or a position that the model does not have.
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
    """InputError unless the model has these tokens and as many positions: Python would take -1 for the last one."""
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
    """(C,) to logits (V,): logit_v = hidden . embedding of token v. The next token is likely if its embedding is near.

    The embedding is used twice, and no head of its own is stored. [tied] section 3; [gpt-1] section 3.1, W_e; [openai]
    `model`.
    """
    return [dot(hidden, row) for row in token_embedding]


def forward(model: Model, ids: Sequence[int], cache: KVCache | None = None) -> list[list[float]]:
    """(T,) ids to (T, V): after each token, the logits of the next one."""
    return [tied_head(row, model.parameters["wte.weight"]) for row in hidden_states(model, ids, cache)]


# ---------------------------------------------------------------------------------------------------------------------
# The next token
# ---------------------------------------------------------------------------------------------------------------------


def greedy(logits: Row) -> int:
    """The most probable token, the first of equals."""
    return max(range(len(logits)), key=logits.__getitem__)


def logits_to_probs(logits: Row, temperature: float) -> list[float]:
    """softmax(logits / temperature): below 1 sharper, above 1 flatter. [openai] `sample_sequence`.

    The largest logit becomes 0 first, so that it can be divided by any positive temperature.
    """
    largest = max(logits)
    return softmax([(value - largest) / temperature for value in logits])


def sample(probs: Row, uniform: float) -> int:
    """The first token whose cumulative probability exceeds `uniform`, a number from [0, 1).

    Tokens divide the line from 0 to 1 among them, each as long as it is probable, and the number falls onto one.
    """
    cumulative = list(accumulate(probs))
    total = cumulative[-1]  # 1, but for rounding
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
    """The tokens after the prompt, one at a time, up to the end-of-text token. Temperature 0 is greedy.

    Only ids below `vocab_size` are chosen, since models are often padded to more rows than there are tokens. When the text
    outgrows the context, its older half is dropped, and the rest is computed anew: positions are counted from its start.
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
        if token == config.eos_token_id:
            return
        ids, new = [*ids, token], [token]


def start_of(config: GPT2Config, prompt_ids: Sequence[int]) -> list[int]:
    """The prompt, or the token from which texts begin where it is empty."""
    if not prompt_ids and config.bos_token_id is None:
        raise InputError("the prompt is empty and this model has no bos_token_id to start from: give it a token")
    return list(prompt_ids) or [config.bos_token_id or 0]


def choose(logits: Row, options: GenerationConfig, generator: random.Random) -> int:
    """The next token, by the largest logit or by chance."""
    if not math.isfinite(sum(logits)):
        raise CheckpointError("the model computes NaN or infinite logits: its weights are damaged; get them again")
    if options.greedy:
        return greedy(logits)
    return sample(logits_to_probs(logits, options.temperature), generator.random())


# ---------------------------------------------------------------------------------------------------------------------
# Files and the command
# ---------------------------------------------------------------------------------------------------------------------


def load_model(name_or_folder: str | os.PathLike[str]) -> Model:
    """A model from a folder with config.json and model.safetensors, or by name where it ships or is cached.

    A number takes 4 bytes in memory (8 where the file has that many), whether the file has 4 or 2.
    """
    folder = locate_float_model(name_or_folder)
    config = read_config(folder)
    tensors = find_parameters(folder, config)
    return Model(config, {name: read_parameter(name, tensor) for name, tensor in tensors.items()})


def read_parameter(name: str, tensor: StoredTensor) -> Any:
    """A vector as an array, an embedding as its rows, the weight of a linear layer as its columns."""
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
    """The command line."""
    parser = _OneLineParser(prog="python -m gpt2.reference.python_gpt2", description="Continue PROMPT, in plain Python.")
    parser.add_argument("prompt")
    parser.add_argument("--from_pretrained", metavar="NAME", default="gpt2", help="a folder, a shipped model or a hub name")
    parser.add_argument("--max_new_tokens", type=int, default=20)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--seed", type=int, help="makes samples repeatable")
    return parser.parse_args(arguments)


def write_continuation(options: argparse.Namespace) -> None:
    """Print the prompt and what the model adds to it, token by token."""
    from gpt_encoder import StreamDecoder  # here, for to read this file one needs no tokenizer

    how = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "seed": options.seed}
    GenerationConfig(**how)  # what is wrong should be said before the weights are read
    folder = locate_float_model(options.from_pretrained)
    tokenizer = tokenizer_of(folder)
    prompt_ids, text = tokenizer.encode(options.prompt), StreamDecoder(tokenizer)
    model = load_model(folder)
    if len(prompt_ids) > model.config.n_positions:
        n = model.config.n_positions
        print(f"warning: the prompt has {len(prompt_ids)} tokens and the model sees the last {n}", file=sys.stderr)
    print(options.prompt, end="", flush=True)
    for token in generate(model, prompt_ids, vocab_size=tokenizer.vocab_size, **how):
        if token != model.config.eos_token_id:
            print(text.push(token), end="", flush=True)
    print(text.flush())


def tokenizer_of(folder: Path) -> Tokenizer:
    """The folder's own tokenizer; where it has none and the vocabulary is as large as OpenAI's, it is taken for OpenAI's."""
    from gpt_encoder.tokenizer import has_tokenizer, load_tokenizer

    is_openai = not has_tokenizer(folder) and read_config(folder).vocab_size == GPT2Config().vocab_size
    return load_tokenizer("gpt2" if is_openai else folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if all went well, 1 after an error, which is one line on stderr."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a stand-in for it
    try:
        write_continuation(parse_arguments(arguments))
    except GPT2Error as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except (KeyboardInterrupt, BrokenPipeError):  # nobody wants to read on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at exit would complain
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
