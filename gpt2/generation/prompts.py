"""Prompts as callers give them: texts or ids, one or many. It depends on the tokenizer, not on models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any, Literal

from gpt_config.errors import InputTypeError
from gpt_config.generation_config import GenerationConfig
from gpt_encoder.interface import Tokenizer

# A text, or token ids: a list, a tuple, or a 1-dimensional tensor or array.
Prompt = str | Sequence[int]


class TemplateText(str):
    """A text around which a template has written something. `parts` are (text, whether the template wrote it).

    Special tokens are tokens in what the template wrote, and ordinary text in what a user wrote.
    """

    parts: tuple[tuple[str, bool], ...]

    def __new__(cls, parts: Iterable[tuple[str, bool]]) -> TemplateText:
        """The text of all parts together."""
        kept = tuple(parts)
        text = super().__new__(cls, "".join(part for part, _ in kept))
        text.parts = kept
        return text

    def each(self, change: Callable[[str], str]) -> TemplateText:
        """Return the text with each part changed."""
        return TemplateText((change(part), is_template) for part, is_template in self.parts)

    def pieces(self, tokenizer: Tokenizer) -> list[str | int]:
        """Return the ids of the template's special tokens, and the texts before, between and after them."""
        pieces: list[str | int] = []
        for text, is_template in self.parts:
            for piece in tokenizer.special_parts(text, tokenizer.special_tokens) if is_template else [text]:
                if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
                    pieces[-1] += piece  # joined, because a token may begin in one part and end in the next
                else:
                    pieces.append(piece)
        return pieces


def each_prompt(prompts: Prompt | Iterable[Prompt]) -> Iterator[str | list[int]]:
    """Yield the prompts one after another, as `prompts` gives them: it may be a generator.

    A str, and a list of ids, are one prompt. Raises InputTypeError for anything else that is no text, no ids and not several
    of these; at once if `prompts` has a wrong type, and otherwise when the wrong prompt is reached.
    """
    if isinstance(prompts, str):
        return iter((prompts,))
    values: Any = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if not isinstance(values, Iterable) or isinstance(values, (bytes, bytearray, Mapping, AbstractSet)):
        raise InputTypeError(
            f"prompts must be a str, a list of token ids, or several of these, not {type(prompts).__name__}"
        )
    if isinstance(values, (list, tuple)) and values and all(map(_is_id, values)):
        return iter((list(map(int, values)),))
    return map(_one_prompt, values)


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: str | list[int],
    allowed_special: Literal["all"] | Collection[str] = (),
    add_special_tokens: bool = True,
) -> list[int]:
    """Return the ids of a prompt; ids stay as they are. What a template wrote may be special tokens: `TemplateText`."""
    if not isinstance(prompt, str):
        return prompt
    pieces = prompt.pieces(tokenizer) if isinstance(prompt, TemplateText) else [prompt]
    if pieces == [prompt]:
        return tokenizer.encode(prompt, allowed_special=allowed_special, add_special_tokens=add_special_tokens)
    ids: list[int] = list(tokenizer.first_ids) if add_special_tokens else []
    for piece in pieces:
        if isinstance(piece, int):
            ids.append(piece)
        else:
            ids += tokenizer.encode(piece, allowed_special=allowed_special, add_special_tokens=False)
    return [*ids, *tokenizer.last_ids] if add_special_tokens else ids


def text_of(tokenizer: Tokenizer, prompt: str | list[int]) -> str:
    """Return the text of a prompt."""
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)


def with_bad_word_ids(config: GenerationConfig, tokenizer: Tokenizer) -> GenerationConfig:
    """Return `config` with each text in `bad_words` replaced by its ids, alone and after a space.

    A word at the beginning of a text has other tokens than after a space. Other ways to write it in tokens are not excluded.
    """
    if all(not isinstance(word, str) for word in config.bad_words):
        return config
    words: list[tuple[int, ...]] = []
    for word in config.bad_words:
        texts = [word, f" {word}"] if isinstance(word, str) else []
        words += [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        words += [] if isinstance(word, str) else [word]
    return replace(config, bad_words=tuple(dict.fromkeys(words)))


def _is_id(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool) and not getattr(value, "shape", ())


def _one_prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    values = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(values, (list, tuple)) or not all(map(_is_id, values)):
        raise InputTypeError(f"a prompt must be a str or a list of token ids, not {type(prompt).__name__}")
    return list(map(int, values))
