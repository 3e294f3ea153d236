"""StreamDecoder: decode one token at a time, without splitting a character. It knows nothing of the source of the tokens."""

from __future__ import annotations

import codecs

from gpt_encoder.interface import Tokenizer


class StreamDecoder:
    """Converts a stream of ids to a stream of text, which joins to `tokenizer.decode` of all ids.

    A character that spans several tokens (most emoji, many scripts) is returned with its last token.

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
        """The characters that `token_id` completes, "" if it completes none. Raises InputError for an unknown id."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token_id]))

    def flush(self) -> str:
        """The rest of the text: U+FFFD if the stream ended inside a character, otherwise "". Resets the decoder."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
