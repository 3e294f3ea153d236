"""TextStream: the text of one continuation as it grows, cut at the stop string that ends first. It knows no model."""

from __future__ import annotations

from collections.abc import Sequence

from gpt2.generation.row import Row
from gpt_encoder.interface import Tokenizer
from gpt_encoder.stream_decoder import StreamDecoder


class TextStream:
    """The text of one continuation, up to the stop string that ends first. `text` is all that was given out."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = stop
        self._held = ""  # not given out yet, because a stop string may have begun in it
        self._pieces: list[str] = []
        self._n_read = 0
        self.stopped = False

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def read(self, row: Row) -> str:
        """The text that the row's tokens since the last call complete. A stop string in it ends the row."""
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
            del row.ids[self._n_read :], row.logprobs[self._n_read :]  # a beam may have tokens after the stop
        return piece

    def _give(self, new: str, *, at_end: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        # The one that ends first, for so it does not matter into which pieces the text is cut.
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
        """The longest end of `text` with which a stop string begins."""
        begun = (n for stop in self._stop for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
        return max(begun, default=0)
