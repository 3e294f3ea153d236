"""Load and save models: the class `gpt2.GPT2`, and the functions that its methods call.

The class in `model.py` is the architecture. `GPT2` here computes the same and adds `from_pretrained`, `save_pretrained` and
`generate`. It depends on `gpt2.weights`, `gpt2.quantization`, `gpt2.generation` and `gpt2.adapters`. Modules that loading
rarely needs are imported inside functions, because imports delay the first token of a command.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor

from gpt2 import model as architecture
from gpt2.device import resolve_device, resolve_dtype
from gpt2.generation.loop import generate
from gpt2.generation.processors import LogitsProcessor
from gpt2.quantization.quantize import is_int8, quantize_int8
from gpt2.weights.files import read_tensors
from gpt2.weights.folder import foreign_model, is_adapter_folder, locate_base, locate_model, locate_whole_model
from gpt2.weights.for_others import describe_tokenizer, write_chat_template, write_generation_config
from gpt2.weights.names import published_names
from gpt2.weights.reading import assemble, read_config
from gpt2.weights.tokenizer import tokenizer_of
from gpt_config.atomic_write import atomic_write_json
from gpt_config.errors import CheckpointError, InputError, Remedy
from gpt_config.generation_config import GenerationConfig, GenerationOptions
from gpt_config.model_config import INT8_FIELDS, is_untied
from gpt_config.unfinished import unchanged
from gpt_config.whole_folder import whole_folder
from gpt_encoder.tokenizer import has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from gpt2.adapters.files import Adapter
    from gpt_encoder.interface import Tokenizer

# Tokens that `dtype="auto"` generates to test a dtype.
_N_TOKENS = 48

# Nats. Two tokens are tied if their log-probabilities in float32 differ by less than this.
_TIE = 0.01


class GPT2(architecture.GPT2):
    """GPT-2: embeddings, blocks, a final layer norm, and the token embedding again as the head.

    >>> from gpt_config import GPT2Config
    >>> model = GPT2(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)).eval()
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 11])
    """

    pretrained_from: Path | None = None  # the folder of the model and its tokenizer

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        device: str = "cpu",
        dtype: str = "float32",
        revision: str | None = None,
    ) -> GPT2:
        """Load a model, in eval mode, from a folder, the shipped models or the hub: see `load_model`."""
        return load_model(name_or_folder, device=device, dtype=dtype, revision=revision)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        tokenizer: Tokenizer | None = None,
        dtype: str | torch.dtype | None = None,
        max_shard_size: int | str = "50GB",
    ) -> None:
        """Write a folder that this package and transformers can load: see `save_model`."""
        save_model(self, folder, tokenizer=tokenizer, dtype=dtype, max_shard_size=max_shard_size)

    def resize(self, rows: Tokenizer | int, *, new_rows: str = "mean", seed: int = 0) -> None:
        """Give the token embedding, which is also the head, a row for each id of a tokenizer, or `rows` rows, in place.

        New rows are the mean of the old ones, or "random": see `gpt2.weights.resize`.
        """
        from gpt2.weights.resize import resize

        resize(self, rows, new_rows=new_rows, seed=seed)

    def generate(
        self,
        input_ids: Tensor | None = None,
        config: GenerationConfig | None = None,
        *,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        draft_model: architecture.GPT2 | None = None,
        inputs_embeds: Tensor | None = None,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Tensor:
        """Return `input_ids` (B, T) followed by new tokens: see `gpt2.generation.loop.generate`."""
        return generate(
            self,
            input_ids,
            config,
            attention_mask=attention_mask,
            use_cache=use_cache,
            draft_model=draft_model,
            inputs_embeds=inputs_embeds,
            logits_processor=logits_processor,
            **options,
        )


def load_model(
    name_or_folder: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
) -> GPT2:
    """Return a GPT-2 model in eval mode.

    `name_or_folder` is a folder, the name of a shipped model, or a hub name such as gpt2 or openai-community/gpt2-xl. For
    the folder of an adapter, the base model is loaded and the adapter merged into it. A file of another program that
    `gpt2 import` knows is loaded without its tokenizer (`load_foreign`). `revision` is a branch, tag or commit of a hub's
    repository; the name "gpt2@main" has one too.

    `dtype` "int8" stores one byte per weight and computes in float32 (`gpt2.quantization`); a folder that was saved in int8
    is loaded the same way. "auto" is the fastest dtype on this machine with the greedy text of float32 (`load_fastest`).

    On the CPU, weights that already have the requested dtype are views of the mapped file: they are read when they are
    first used, and take no memory besides the page cache. Other weights are converted one after another.

    Raises ModelNotFoundError, CheckpointError, ConfigError or DeviceError; each message says what to do.
    """
    if dtype not in ("auto", "int8"):
        target_device, target_dtype = resolve_device(device), resolve_dtype(dtype)
    if dtype not in ("auto", "int8") and revision is None and (foreign := foreign_model(name_or_folder)):
        return load_foreign(*foreign)[0].to(device=target_device, dtype=target_dtype)
    folder = locate_model(name_or_folder, revision=revision)
    if dtype == "auto":
        return load_fastest(folder, device=device)
    if dtype == "int8":
        return _load_int8(folder, device)
    if is_adapter_folder(folder):
        return load_merged(folder, device=target_device, dtype=target_dtype)
    with unchanged(folder):
        config = read_config(folder)
        tensors = published_names(read_tensors(folder), folder, is_untied=is_untied(folder))
    if "score.weight" in tensors:
        raise CheckpointError(f"{folder} contains a classifier, not a language model: use gpt2 classify")
    model = assemble(GPT2, config, tensors, folder, device=target_device, dtype=target_dtype)
    model.pretrained_from = folder
    return model


def load_foreign(path: Path, format_name: str | None = None) -> tuple[GPT2, Tokenizer | None]:
    """Return the model and the tokenizer, if it has one, of a file or folder of another program: see `gpt2.formats`.

    The format is `format_name`, or what the content shows. The model keeps the dtype of the file. A model with the size of
    OpenAI's vocabulary gets OpenAI's tokenizer. Raises CheckpointError.
    """
    from gpt2.formats.registry import OPENAI_ROWS, read_foreign

    config, tensors, tokenizer = read_foreign(path, format_name)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    model = assemble(GPT2, config, tensors, path, device=torch.device("cpu"), dtype=dtype)
    if tokenizer is None and config.vocab_size in OPENAI_ROWS:
        tokenizer = load_tokenizer("gpt2")
    return model, tokenizer


def _load_int8(name_or_folder: str | os.PathLike[str], device: str | torch.device) -> GPT2:
    model = load_model(name_or_folder, dtype="float32")
    if not is_int8(model):
        quantize_int8(model)
        # Copy the tensors that are still views of the file: one view keeps the whole file mapped.
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.clone()
    return model.to(resolve_device(device))


def load_merged(
    folder: Path,
    base_model: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> GPT2:
    """Return the base model of an adapter, or `base_model`, with the adapter merged into it, in eval mode.

    The sum is computed in float32 or a wider dtype, and rounded to `dtype` once. If `folder` has a tokenizer, the model uses
    that one.
    """
    from gpt2.adapters.files import load_adapter, read_adapter
    from gpt2.adapters.lora import merge_lora

    adapter = read_adapter(folder)
    target_dtype = resolve_dtype(dtype)
    model = load_base(adapter, base_model, dtype=torch.promote_types(target_dtype, torch.float32))
    load_adapter(model, adapter)
    merge_lora(model)
    if has_tokenizer(folder):
        model.pretrained_from = folder
    return model.to(device=resolve_device(device), dtype=target_dtype)


def load_base(
    adapter: Adapter, base_model: str | os.PathLike[str] | None = None, *, dtype: torch.dtype = torch.float32
) -> GPT2:
    """Return the base model of an adapter, or `base_model` instead, without the adapter.

    Raises CheckpointError if `base_model` is None and the adapter does not name its base model.
    """
    return load_model(locate_base_of(adapter, base_model), dtype=dtype)


def locate_base_of(adapter: Adapter, base_model: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of an adapter's base model, or of `base_model` instead. Errors are those of `load_base`."""
    if base_model is not None:
        return locate_whole_model(base_model)
    if adapter.config.base_model is None:
        raise CheckpointError(
            f"the adapter in {adapter.folder} does not name its base model: merge it into that model, and use the result",
            remedy=Remedy("base_model"),
        )
    return locate_base(adapter.folder, adapter.config.base_model)


def save_model(
    model: architecture.GPT2,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """Write config.json, model.safetensors, generation_config.json and the tokenizer's files: all of them, or none.

    They replace the files of a former model in `folder`; files of other kinds stay. If the process is killed, `folder` has
    the old model, or the new one, or cannot be loaded until it is written again.

    Without `tokenizer`, that of the folder that the model was loaded from is written, with its chat template. For a new
    model, a tokenizer that is in `folder` stays, as in transformers; without one, the model gets OpenAI's if its vocabulary
    has the same size. Adapters are merged into the written weights; the model itself does not change.

    `dtype` is that of the written weights: float32, float16, bfloat16 or float64; None for that of the model. Weights with
    more than `max_shard_size` bytes, such as 5000 or "5GB", are written in several files.

    Raises WriteError, also if another program is writing to `folder`; InputError if a weight is too large for `dtype`, or if
    the model is in int8 and `dtype` is not None; DeviceError for another dtype; ConfigError for a wrong size.
    """
    from gpt2.adapters.lora import merged_parameters
    from gpt2.weights.writing import write_weights

    if dtype is not None and is_int8(model):
        raise InputError(
            "the model is in int8, which has no other dtype: convert it first with gpt2.quantization.quantize.dequantize"
        )
    target = model.dtype if dtype is None else resolve_dtype(dtype)
    values = {
        **model.config.to_dict(),
        "dtype": str(target).removeprefix("torch."),
        **(INT8_FIELDS if is_int8(model) else {}),
    }
    source = getattr(model, "pretrained_from", None)
    has_own = tokenizer is None and source is not None
    if tokenizer is None and (has_own or not has_tokenizer(Path(folder))):
        tokenizer = tokenizer_of(model)
    with whole_folder(folder) as new:
        write_weights(new, merged_parameters(model), dtype=None if dtype is None else target, max_shard_size=max_shard_size)
        atomic_write_json(new / "config.json", values)
        write_generation_config(new, model.config, source)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
            describe_tokenizer(new, model.config)
        if has_own and source is not None:
            write_chat_template(new, source)


def load_fastest(
    name_or_folder: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    agree: Callable[[architecture.GPT2, architecture.GPT2], bool] | None = None,
) -> GPT2:
    """Return the model in the fastest dtype whose greedy text equals that of float32, or in float32 if there is none.

    `is_int8` and `model.dtype` tell which dtype it has. Each test of a dtype takes about as long as generating 50 tokens.
    `agree(candidate, float32_model)` replaces the test, which is `agrees_greedily`.
    """
    agree = agree or agrees_greedily
    target = resolve_device(device)
    reference = load_model(name_or_folder, device=target)
    for dtype in _candidates(target):
        candidate = load_model(name_or_folder, device=target, dtype=dtype)
        if agree(candidate, reference):
            return candidate
    return reference


def _candidates(device: torch.device) -> tuple[str, ...]:
    """Return the dtypes that may be faster than float32, the fastest first: measured on a CPU, estimated on GPUs."""
    if device.type == "cpu":
        return "int8", "bfloat16"
    if device.type == "cuda":
        return ("bfloat16",) if torch.cuda.is_bf16_supported(including_emulation=False) else ("float16",)
    return ()


@torch.inference_mode()
def agrees_greedily(candidate: architecture.GPT2, reference: architecture.GPT2) -> bool:
    """Return whether `reference` would choose each token of the greedy text of `candidate`, except for ties."""
    config = reference.config
    start = torch.tensor([[config.bos_token_id or 0]], device=reference.device)
    ids = generate(candidate, start, max_new_tokens=min(_N_TOKENS, config.n_positions - 1), stop_at_eot=False)
    log_probs = reference(ids[:, :-1]).float().log_softmax(-1)[0]
    chosen = log_probs.gather(1, ids[0, 1:, None])[:, 0]
    return bool((log_probs.amax(-1) - chosen < _TIE).all())
