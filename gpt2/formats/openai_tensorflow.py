"""OpenAI's folder of a GPT-2, in and out: a TensorFlow checkpoint with hparams.json, encoder.json and vocab.bpe.

gpt-2-simple and other programs for fine-tuning write the same, with the optimizer's variables, which are skipped.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt2.formats.layout import check_computes
from gpt2.formats.registry import Imported, config_of, with_end_token
from gpt2.formats.tensor_bundle import Bundle, read_index, read_tensor, write_bundle
from gpt2.weights.foreign import tensorflow_prefix
from gpt_config.errors import CheckpointError, InputError
from gpt_config.file_reading import read_json
from gpt_encoder.interface import EOT_TOKEN
from gpt_encoder.tokenizer import GPT2Tokenizer

if TYPE_CHECKING:
    from gpt2.model import GPT2
    from gpt_encoder.interface import Tokenizer

TITLE = "a TensorFlow checkpoint"
DTYPES = ("float32",)
IS_FOLDER = True

_NAME = re.compile(r"model/(?:h(\d+)/)?((?:attn/|mlp/)?(?:wte|wpe|ln_1|ln_2|ln_f|c_attn|c_proj|c_fc))(?:/([gbw]))?")
_SIZES = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")


def read(path: Path) -> Imported:
    """Read a folder, or one of the checkpoint's files. The tokenizer's files are read if they are beside it."""
    prefix = tensorflow_prefix(path)
    if prefix is None:
        raise CheckpointError(f"{path} is not {TITLE}: it needs a file .index and its .data files")
    bundle = read_index(prefix)
    sizes = prefix.parent / "hparams.json"
    try:
        found = read_json(sizes)
        fields = {name: found[name] for name in _SIZES}
    except OSError as error:
        raise CheckpointError(
            f"cannot read {sizes} ({error.strerror}): copy it from the model that was trained, because the checkpoint does "
            "not say how many heads it has"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{sizes} is damaged: it needs {', '.join(_SIZES)}") from None
    config = config_of(sizes, TITLE, **{"vocab_size": fields["n_vocab"]}, **fields)
    tensors = {ours: _tensor(bundle, name) for name in bundle.entries if (ours := published_name(name))}
    tokenizer = None
    if all((prefix.parent / name).is_file() for name in ("encoder.json", "vocab.bpe")):
        tokenizer = GPT2Tokenizer.from_files(prefix.parent / "encoder.json", prefix.parent / "vocab.bpe")
        config = with_end_token(config, tokenizer.eot_token_id)
    return Imported(config, tensors, tokenizer)


def published_name(name: str) -> str | None:
    """Return the published name of a variable, or None for one that is no weight.

    >>> published_name("model/h11/attn/c_attn/w"), published_name("model/wte/Adam")
    ('h.11.attn.c_attn.weight', None)
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    layer, module, kind = found.groups()
    block = "" if layer is None else f"h.{int(layer)}."
    return f"{block}{module.replace('/', '.')}.{'bias' if kind == 'b' else 'weight'}"


def variable_name(name: str) -> str:
    """Return the name of the variable of a published parameter.

    >>> variable_name("h.11.attn.c_attn.weight"), variable_name("wte.weight"), variable_name("ln_f.weight")
    ('model/h11/attn/c_attn/w', 'model/wte', 'model/ln_f/g')
    """
    parts = name.split(".")
    if parts[0] == "h":
        parts[:2] = [f"h{parts[1]}"]
    kind = parts.pop()
    letter = "b" if kind == "bias" else "g" if parts[-1].startswith("ln_") else "w"
    return "/".join(["model", *parts, *([] if parts[-1] in ("wte", "wpe") else [letter])])


def _tensor(bundle: Bundle, name: str) -> Tensor:
    values = torch.from_numpy(read_tensor(bundle, name).copy())
    if bundle.entries[name].dtype == "bfloat16":
        values = values.view(torch.bfloat16)
    is_matrix = name.endswith("/w") and values.dim() == 3 and values.shape[0] == 1  # a convolution of width 1
    return values[0] if is_matrix else values


def write(model: GPT2, tokenizer: Tokenizer | None, path: Path, dtype: str) -> None:
    """Write the checkpoint `model.ckpt` with hparams.json, encoder.json and vocab.bpe into the folder `path`."""
    config = model.config
    check_computes(config, TITLE)
    if tokenizer is not None:
        _write_tokenizer(tokenizer, path)
    sizes = (config.vocab_size, config.n_positions, config.n_embd, config.n_head, config.n_layer)
    (path / "hparams.json").write_text(json.dumps(dict(zip(_SIZES, sizes, strict=True))) + "\n")
    values: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        variable = variable_name(name)
        numbers = tensor.detach().float().numpy()
        values[variable] = numbers[None] if variable.endswith("/w") else numbers
    write_bundle(path / "model.ckpt", values)
    (path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n')


def _write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write encoder.json and vocab.bpe. InputError if they cannot say what the tokenizer does."""
    if not isinstance(tokenizer, GPT2Tokenizer):
        raise InputError(f"{TITLE} has no place for a {type(tokenizer).__name__}: choose another format")
    vocabulary = tokenizer.vocabulary
    others = {*vocabulary.special_tokens, *(token.text for token in vocabulary.added_tokens)} - {EOT_TOKEN}
    if others or vocabulary.first_ids or vocabulary.last_ids:
        what = f"the added token {min(others)!r}" if others else "tokens that begin or end each text"
        raise InputError(f"{TITLE} has no place for {what}: choose another format")
    ids = {**vocabulary.token_ids, **vocabulary.special_tokens}
    (folder / "encoder.json").write_text(json.dumps(ids), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, vocabulary.merges), ""]
    (folder / "vocab.bpe").write_bytes("\n".join(lines).encode("utf-8"))
