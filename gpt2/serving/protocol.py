"""Bodies of requests to prompts and a GenerationConfig, with a bound on every field. It knows no HTTP and no engine."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpt2.serving.fields import ApiError, Fields, shown
from gpt2.serving.models import Served
from gpt2.weights.tokenizer import check_ids
from gpt_config.errors import ConfigError, GPT2Error
from gpt_config.generation_config import GenerationConfig

# Bounds on a request.
MOST_CHOICES = 128  # n and best_of
MOST_ROWS = 1024  # prompts times best_of
MOST_TOP = 20  # alternatives of a token
MOST_TOKENS = 2**31  # new tokens; the context allows fewer, with an error of its own
MOST_NUMBERS = 2**20  # log-probabilities in an answer, about 100 bytes each
MOST_STOPS = 16
LONGEST_STOP = 256  # characters
MOST_BIASES = 1024
MOST_MESSAGES = 1024
DEFAULT_TOKENS = 16  # as in OpenAI's API

_OTHER_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "stop_at_eot": "ignore_eos",
}
_OF_COMPLETIONS = {"suffix": ("GPT-2 only continues a text: leave it out", lambda value: value == "")}
_OF_CHAT = {
    "tools": ("GPT-2 calls no tools: leave it out", lambda value: value == []),
    "functions": ("GPT-2 calls no functions: leave it out", lambda value: value == []),
    "tool_choice": ("GPT-2 calls no tools: leave it out", lambda value: value in ("none", "auto")),
    "function_call": ("GPT-2 calls no functions: leave it out", lambda value: value in ("none", "auto")),
    "response_format": ("only text is generated: leave it out", lambda value: value == {"type": "text"}),
    "modalities": ("only text is generated: leave it out", lambda value: value == ["text"]),
    "audio": ("only text is generated: leave it out", lambda value: False),
    "prediction": ("it would change nothing: leave it out", lambda value: False),
}


@dataclass(frozen=True)
class Request:
    """What a body asks for. `logprobs`: alternatives of each token, 0 to 20; None: no log-probabilities."""

    prompts: list[list[int]]
    config: GenerationConfig
    n: int
    best_of: int
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt's tokens are part of the answer."""
        return self.echo and self.logprobs is not None


def completion_request(fields: Fields, served: Served) -> Request:
    """Read the body of `/v1/completions`. Raises ApiError."""
    fields.refuse(_OF_COMPLETIONS)
    prompts = prompts_of(fields, "prompt", served, special=fields.flag("special_tokens"))
    logprobs = fields.integer("logprobs", 0, MOST_TOP)
    max_tokens = fields.whole("max_tokens", 0, MOST_TOKENS, DEFAULT_TOKENS)
    return _request(fields, served, prompts, max_tokens=max_tokens, logprobs=logprobs, echo=fields.flag("echo"))


def chat_request(fields: Fields, served: Served) -> Request:
    """Read the body of `/v1/chat/completions`. Raises ApiError, also if the model has no chat template."""
    fields.refuse(_OF_CHAT)
    if served.template is None:
        raise ApiError(
            f"{served.name} has no chat template: use /v1/completions, or a model that gpt2 finetune taught to respond",
            code="no_chat_template",
            param="model",
        )
    try:
        prompt = served.template.ids(_messages(fields), served.tokenizer)
    except GPT2Error as error:
        raise ApiError(str(error), param="messages") from None
    _check_prompt(prompt, served, "messages")
    if not prompt:
        raise ApiError("the chat template makes an empty prompt of the messages: send a text", param="messages")
    room = served.n_positions + 1 - len(prompt)
    name = "max_tokens" if fields.get("max_completion_tokens") is None else "max_completion_tokens"
    max_tokens = fields.integer(name, 0, MOST_TOKENS)
    top = fields.integer("top_logprobs", 0, MOST_TOP)
    if not fields.flag("logprobs") and top:
        raise fields.wrong("top_logprobs", "needs logprobs to be true")
    logprobs = (top or 0) if fields.flag("logprobs") else None
    max_tokens = room if max_tokens is None else max_tokens
    return _request(fields, served, [prompt], max_tokens=max_tokens, logprobs=logprobs, echo=False)


def _request(
    fields: Fields, served: Served, prompts: list[list[int]], *, max_tokens: int, logprobs: int | None, echo: bool
) -> Request:
    for name, right in _OTHER_NAMES.items():
        if fields.get(name) is not None:
            raise ApiError(f"{name} is not a field of this API: use {right}", code="unsupported", param=name)
    n = fields.whole("n", 1, MOST_CHOICES, 1)
    best_of = fields.whole("best_of", 1, MOST_CHOICES, n)
    stream = fields.flag("stream")
    if best_of < n:
        raise fields.wrong("best_of", f"must be at least n={n}")
    if best_of > n and stream:
        raise fields.wrong("best_of", f"must equal n={n} in a stream: the best texts are known only at the end")
    if len(prompts) * best_of > MOST_ROWS:
        raise ApiError(
            f"{len(prompts)} prompts with {best_of} choices each are more than {MOST_ROWS} texts: send several requests",
            param="prompt",
        )
    longest = max(map(len, prompts))
    if longest + max_tokens > served.n_positions + 1:
        raise _too_long(f"the prompt has {longest} tokens and max_tokens={max_tokens}", served, "max_tokens")
    n_scored = len(prompts) * best_of * max_tokens + (sum(map(len, prompts)) if echo else 0)
    if logprobs is not None and n_scored * (logprobs + 1) > MOST_NUMBERS:
        raise ApiError(
            f"logprobs={logprobs} of up to {n_scored} tokens are more than {MOST_NUMBERS} numbers: send several requests",
            param="logprobs",
        )
    options = fields.object("stream_options")
    if fields.get("stream_options") is not None and not stream:
        raise fields.wrong("stream_options", "needs stream to be true")
    config = _config(fields, served, max_tokens, best_of, logprobs)
    return Request(prompts, config, n, best_of, logprobs, echo, stream, options.flag("include_usage"))


def _config(fields: Fields, served: Served, max_tokens: int, best_of: int, logprobs: int | None) -> GenerationConfig:
    temperature = fields.number("temperature", 0, 2, 1)
    seed = fields.integer("seed", 0, 2**63 - 1)
    min_tokens = fields.whole("min_tokens", 0, served.n_positions, 0)
    if min_tokens > max_tokens:
        raise fields.wrong("min_tokens", f"must be at most max_tokens={max_tokens}")
    penalty = fields.number("repetition_penalty", 0.01, 100, 1)
    top_k = fields.whole("top_k", -1, 2**31, 0)
    try:
        return GenerationConfig(
            max_new_tokens=max_tokens,
            min_new_tokens=min_tokens,
            do_sample=temperature > 0,
            temperature=temperature,
            top_k=max(top_k, 0),
            top_p=max(fields.number("top_p", 0, 1, 1), 1e-9),  # 0: the most probable token alone
            min_p=fields.number("min_p", 0, 1, 0) or None,
            repetition_penalty=penalty,
            frequency_penalty=fields.number("frequency_penalty", -2, 2, 0),
            presence_penalty=fields.number("presence_penalty", -2, 2, 0),
            logit_bias=_biases(fields, served),
            stop=_stops(fields),
            stop_at_eot=not fields.flag("ignore_eos"),
            top_logprobs=logprobs or 0,
            num_return_sequences=best_of,
            seed=secrets.randbits(31) if seed is None else seed,
            speculate=served.speculate,
        )
    except ConfigError as error:
        raise ApiError(str(error), param=error.field) from None


def _biases(fields: Fields, served: Served) -> tuple[tuple[int, float], ...]:
    biases = fields.object("logit_bias")
    if len(biases.items()) > MOST_BIASES:
        raise ApiError(f"logit_bias names more than {MOST_BIASES} tokens: name fewer", param="logit_bias")
    found: dict[int, float] = {}
    n_ids = min(served.model.config.vocab_size, served.tokenizer.vocab_size)
    for name, _ in biases.items():
        token = int(name) if name.isascii() and name.isdecimal() and len(name) < 10 else -1
        if not 0 <= token < n_ids:
            message = f"logit_bias names the token {shown(name)}: ids go from 0 to {n_ids - 1}"
            raise ApiError(message, param="logit_bias")
        found[token] = biases.number(name, -100, 100, 0)
    return tuple(sorted(found.items()))


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise fields.wrong("stop", "must be a string or a list of strings", code="invalid_type")
    if len(stops) > MOST_STOPS:
        raise ApiError(f"stop has {len(stops)} strings: send at most {MOST_STOPS}", param="stop")
    if wrong := [stop for stop in stops if not 0 < len(stop) <= LONGEST_STOP]:
        raise ApiError(f"stop={shown(wrong[0])} must have 1 to {LONGEST_STOP} characters", param="stop")
    return tuple(stops)


def prompts_of(fields: Fields, name: str, served: Served, *, special: bool) -> list[list[int]]:
    """Return the ids of each prompt: of a string, a list of strings, ids, or a list of lists of ids.

    A prompt that is missing, and an empty one, are the model's bos token.
    """
    value = fields.get(name)
    given: list[Any] = [""] if value is None else value if isinstance(value, list) else [value]
    if isinstance(value, list) and value and all(map(_is_id, value)):
        given = [value]
    if not given:
        raise fields.wrong(name, "is empty: send at least one prompt")
    if len(given) > MOST_ROWS:
        raise ApiError(f"{name} has {len(given)} prompts: send at most {MOST_ROWS}", param=name)
    is_text, are_ids = isinstance(given[0], str), isinstance(given[0], list)
    if is_text and all(isinstance(prompt, str) for prompt in given):
        prompts = [encoded(prompt, served, name, special=special) for prompt in given]
    elif are_ids and all(isinstance(prompt, list) and all(map(_is_id, prompt)) for prompt in given):
        prompts = given
    else:
        message = "must be a string, a list of strings, token ids, or a list of lists of token ids"
        raise fields.wrong(name, message, code="invalid_type")
    return [_with_start(prompt, served, name) for prompt in prompts]


def _with_start(prompt: list[int], served: Served, name: str) -> list[int]:
    if not prompt:
        first = served.model.config.bos_token_id
        if first is None:
            raise ApiError(f"{name} is empty, and this model has no token to begin with: send a text", param=name)
        prompt = [first]
    _check_prompt(prompt, served, name)
    return prompt


def encoded(text: str, served: Served, name: str, *, special: bool, add_special_tokens: bool = True) -> list[int]:
    """Return the ids of a text. With `special`, special tokens in it are read as such. Raises ApiError if it is too long."""
    if len(text) > (served.n_positions + 1) * served.longest_token:  # before it is encoded, which takes time
        raise _too_long(f"{name} has {len(text)} characters", served, name)
    allowed: Any = "all" if special else ()
    ids: list[int] = served.tokenizer.encode(text, allowed_special=allowed, add_special_tokens=add_special_tokens)
    return ids


def _check_prompt(ids: Sequence[int], served: Served, name: str) -> None:
    if len(ids) > served.n_positions:
        raise _too_long(f"{name} has {len(ids)} tokens", served, name)
    n_ids = min(served.model.config.vocab_size, served.tokenizer.vocab_size)
    if wrong := [token for token in ids if not 0 <= token < n_ids or token not in served.tokenizer.token_bytes]:
        raise ApiError(f"{name} has the token id {shown(wrong[0])}: ids go from 0 to {n_ids - 1}", param=name)
    try:
        check_ids(ids, served.tokenizer, served.model.config.vocab_size)
    except GPT2Error as error:
        raise ApiError(str(error), param=name) from None


def _too_long(what: str, served: Served, name: str) -> ApiError:
    return ApiError(
        f"{what}, and the context of {served.name} is {served.n_positions} tokens: send less",
        code="context_length_exceeded",
        param=name,
    )


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def token_ids(fields: Fields, name: str, served: Served) -> list[int]:
    """Return the ids in a field. Raises ApiError if one has no text."""
    value = fields.get(name)
    if not isinstance(value, list) or not all(map(_is_id, value)):
        raise fields.wrong(name, "must be a list of token ids", code="invalid_type")
    if wrong := [token for token in value if token not in served.tokenizer.token_bytes]:
        message = f"{name} has the token id {shown(wrong[0])}: ids go from 0 to {served.tokenizer.vocab_size - 1}"
        raise ApiError(message, param=name)
    return value


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _messages(fields: Fields) -> list[dict[str, str]]:
    value = fields.get("messages")
    if not isinstance(value, list) or not value:
        raise fields.wrong("messages", "must be a list of at least one message", code="invalid_type")
    if len(value) > MOST_MESSAGES:
        raise ApiError(f"messages has {len(value)} messages: send at most {MOST_MESSAGES}", param="messages")
    return [_message(item, f"messages[{number}]") for number, item in enumerate(value)]


def _message(item: object, place: str) -> dict[str, str]:
    if not isinstance(item, dict):
        raise ApiError(f"{place} must be an object with a role and a content", code="invalid_type", param=place)
    message = Fields(item, f"{place}.")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise message.wrong("role", f"must be {', '.join(_ROLES)}")
    content = message.get("content")
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise message.wrong("content", "must be a string, or a list of parts of type text", code="invalid_type")
    return {"role": _ROLES[role], "content": content}


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
