"""The names of new special tokens, and how their rows of the embedding begin. It knows neither tokenizers nor models."""

from __future__ import annotations

from gpt_config.errors import ConfigError

NEW_ROWS = ("mean", "random")
_MOST = 1000  # new tokens at once; a mistake rather than a wish beyond this


def new_tokens(value: object) -> tuple[str, ...]:
    """The texts of new special tokens: those of a list or tuple, or of a string with commas between them.

    ConfigError, with the field add_tokens, if one is empty, contains a surrogate, or is there twice.

    >>> new_tokens("<|user|>, <|assistant|>")
    ('<|user|>', '<|assistant|>')
    """
    texts = [text.strip() for text in value.split(",")] if isinstance(value, str) and value else value or ()
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise _error(f"add_tokens={value!r:.80} must be texts with commas between them, or a list of texts")
    if len(texts) > _MOST:
        raise _error(f"add_tokens has {len(texts)} tokens: it may have {_MOST}")
    for number, text in enumerate(texts):
        if not text or text != text.encode("utf-8", "ignore").decode("utf-8"):
            raise _error(f"add_tokens: the token {text!r} must have at least one character, and no surrogates: rename it")
        if text in texts[:number]:
            raise _error(f"add_tokens: the token {text!r} is there twice: leave one out")
    return tuple(texts)


def _error(message: str) -> ConfigError:
    return ConfigError(message, field="add_tokens")
