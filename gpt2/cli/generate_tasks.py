"""What `gpt2 generate` has to compute: each prompt with its config, checked before anything runs. It prints nothing."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from gpt2.cli.generate_output import Layout, Loaded, Task
from gpt2.cli.options import option_of
from gpt2.cli.prompts import Prompt
from gpt2.cli.sampling_options import EARLY_STOPPING, SamplingOptions
from gpt_config.errors import GPT2Error, GPT2Warning, InputError
from gpt_config.generation_config import GenerationConfig

if TYPE_CHECKING:
    from gpt2.pretrained import GPT2
    from gpt_encoder.interface import Tokenizer


def tasks_of(prompts: Iterable[Prompt], options: SamplingOptions, config: GenerationConfig) -> list[Task]:
    """Each prompt with its config: `config`, or what `options` become with those of its line. InputError names the line."""
    made: dict[str, GenerationConfig] = {}  # equal options are one object, because rows of one config are sampled together
    tasks, without_effect = [], []
    for prompt in prompts:
        key = json.dumps(prompt.options, sort_keys=True)
        if prompt.options and key not in made:
            made[key] = _config_of_line(prompt, options, config)
        tasks.append(Task(prompt, made[key] if prompt.options else config))
        if tasks[-1].config.greedy and not {"top_k", "top_p", "min_p", "seed"}.isdisjoint(prompt.options):
            without_effect.append(prompt.place)
    if without_effect:
        warnings.warn(
            f"{without_effect[0]}: options of sampling have no effect without do_sample ({len(without_effect)} such lines)",
            GPT2Warning,
            2,
        )
    return tasks


def _config_of_line(prompt: Prompt, options: SamplingOptions, config: GenerationConfig) -> GenerationConfig:
    values = {name: _value(prompt, name, value, getattr(options, name)) for name, value in prompt.options.items()}
    try:
        return replace(options, **values).generation_config(speculate=config.speculate)
    except click.UsageError as error:
        raise InputError(f"{prompt.place}: {error.format_message()}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{prompt.place}: an option is wrong ({error})") from None


def _value(prompt: Prompt, name: str, value: Any, of_command: Any) -> Any:
    """The value of a line's option. One that may be given several times is a single value or a list of them."""
    if not isinstance(of_command, tuple):
        if isinstance(value, (list, dict)):
            raise InputError(f"{prompt.place}: {name}={value!r} must be a single value")
        if isinstance(of_command, bool) and not isinstance(value, bool):
            raise InputError(f"{prompt.place}: {name}={value!r} must be true or false")
        if name == "early_stopping":
            value = str(value).lower()
            if value not in EARLY_STOPPING:
                raise InputError(f"{prompt.place}: {name}={value!r} must be one of {', '.join(EARLY_STOPPING)}")
        return value
    if name == "logit_bias" and isinstance(value, dict):  # as in OpenAI's API
        value = [f"{token}={bias}" for token, bias in value.items()]
    kind, named = (int, "number") if name == "eos_token_id" else (str, "string")
    values = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(item, kind) and not isinstance(item, bool) for item in values):
        raise InputError(f"{prompt.place}: {name}={value!r} must be a {named} or a list of {named}s")
    return values


def check_tasks(loaded: Loaded, tasks: Sequence[Task], layout: Layout) -> None:
    """Raise the error of the first prompt that the model cannot continue, with its line, before anything is computed.

    Also warn, with the line, of prompts of which the model sees only the end, and refuse what does not fit in memory.
    """
    from gpt2.generation.loop import start
    from gpt2.generation.memory import check_memory
    from gpt2.generation.prompts import encode_prompt, with_bad_word_ids
    from gpt2.weights.tokenizer import check_ids

    most_tokens = 0
    for prompt, config in tasks:
        try:
            ids = encode_prompt(loaded.tokenizer, prompt.text, layout.allowed_special)
            check_ids(ids, loaded.tokenizer, loaded.model.config.vocab_size)
            with warnings.catch_warnings(record=True) as caught:
                alone = with_bad_word_ids(replace(config, num_return_sequences=1), loaded.tokenizer)
                start(loaded.model, [ids], alone)
        except GPT2Error as error:
            raise InputError(f"{prompt.place}: {error}" if prompt.place else str(error)) from None
        for warning in caught if prompt.place else ():
            warnings.warn(f"{prompt.place}: {warning.message}", GPT2Warning, 2)
        most_tokens = max(most_tokens, len(ids))
    if any(prompt.place for prompt, _ in tasks):
        warnings.filterwarnings("ignore", "a prompt has", GPT2Warning)  # it was just given with the line
    n_rows = sum(config.num_return_sequences for _, config in tasks)
    for config in {id(config): config for _, config in tasks}.values():
        check_memory(loaded.model, most_tokens, config, n_rows=min(n_rows, layout.batch_size))


def settings_of(loaded: Loaded, tasks: Sequence[Task], config: GenerationConfig, layout: Layout) -> dict[str, Any]:
    """What the results depend on, by names of options, for a run that goes on."""
    from gpt2.generation.prompts import encode_prompt

    of_prompts = hashlib.sha256()
    for prompt, of_prompt in tasks:
        ids = encode_prompt(loaded.tokenizer, prompt.text, layout.allowed_special)
        of_prompts.update(repr((prompt.text, ids, prompt.fields, of_prompt if of_prompt is not config else None)).encode())
    of_config = {option_of(name).removeprefix("--"): value for name, value in asdict(config).items() if name != "speculate"}
    return of_config | {
        "echo": layout.echo,
        "json": layout.as_json,
        "special_tokens": layout.special_tokens,
        "batch_size": layout.batch_size,
        "dtype": str(loaded.model.dtype),
        "device": str(loaded.model.device),
        "sha256 of prompts": of_prompts.hexdigest(),
        "sha256 of model": _of_model(loaded.model),
        "sha256 of tokenizer": _of_tokenizer(loaded.tokenizer),
        **({"model": loaded.name} if layout.as_json else {}),  # it is printed
    }


def _of_model(model: GPT2) -> str:
    import torch

    digest = hashlib.sha256(repr(model.config).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _of_tokenizer(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(repr((sorted(tokenizer.token_bytes.items()), tokenizer.special_tokens)).encode()).hexdigest()
