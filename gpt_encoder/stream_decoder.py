"""StreamDecoder: text from tokens one at a time, never half a character. It knows bytes, not where tokens come from."""

from __future__ import annotations

import codecs

from gpt_encoder.interface import Tokenizer


class StreamDecoder:
    """Turns a stream of ids into a stream of text whose pieces join to `tokenizer.decode` of all the ids.

    A character that spans several tokens (most emoji, many scripts) appears with the last of them.

    >>> from gpt_encoder import GPT2Tokenizer
    >>> tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
    >>> stream = StreamDecoder(tokenizer)
    >>> [stream.push(token) for token in tokenizer.encode("a🦙")] + [stream.flush()]
    ['a', '', '', '🦙', '']
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes; "" while one is still open. InputError for an unknown id."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token_id]))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the stream stopped inside a character, else ""."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
