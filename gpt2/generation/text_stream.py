"""TextStream: the growing text of one continuation, up to a stop string. It depends on the tokenizer, not on the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpt2.generation.row import Row
from gpt_encoder.interface import Tokenizer
from gpt_encoder.stream_decoder import StreamDecoder


class TextStream:
    """The text of one continuation, cut before the stop string that ends first. `text` is all text returned so far."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = stop
        self._held = ""  # not returned yet, because a stop string may begin in it
        self._pieces: list[str] = []
        self._n_read = 0
        self.stopped = False

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def read(self, row: Row) -> str:
        """Return the text of the row's tokens since the last call, in whole characters.

        If the text contains a stop string, it sets the row's `finish_reason` and removes the tokens after the stop string.
        """
        piece = ""
        while self._n_read < len(row.ids) and not self.stopped:
            token = row.ids[self._n_read]
            self._n_read += 1
            if row.finish_reason != "eot" or self._n_read < len(row.ids):
                piece += self._give(self._decoder.push(token))
        if row.finish_reason:
            piece += self._give(self._decoder.flush(), at_end=True)
        if self.stopped:
            row.finish_reason = "stop"
            # A beam may have tokens after a stop string that only whole characters show.
            del row.ids[self._n_read :], row.logprobs[self._n_read :], row.top_logprobs[self._n_read :]
        return piece

    def _give(self, new: str, *, at_end: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        # Choose the stop string that ends first: the result then does not depend on how the text is cut into pieces.
        found = [(place + len(stop), place) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            keep = min(found)[1]
        else:
            keep = len(text) if at_end else len(text) - self._length_of_begun_stop(text)
        piece, self._held = text[:keep], text[keep:]
        self._pieces.append(piece)
        return piece

    def _length_of_begun_stop(self, text: str) -> int:
        """Return the length of the longest end of `text` that is the beginning of a stop string."""
        begun = (n for stop in self._stop for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
        return max(begun, default=0)


def stop_test(tokenizer: Tokenizer, stop: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
    """Return a function that says whether the last of some ids completes a stop string; None without stop strings.

    It compares bytes, as transformers does: a stop string in the text is the same bytes in the tokens.
    """
    if not stop:
        return None
    wanted = [text.encode("utf-8", errors="surrogatepass") for text in stop]
    n_last = max(map(len, wanted))  # a token has at least one byte

    def ends_in_stop(ids: Sequence[int]) -> bool:
        data = tokenizer.decode_bytes(ids[-n_last:])
        return any(text in data for text in wanted)

    return ends_in_stop
