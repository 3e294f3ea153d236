"""Window: which of the ids of one growing sequence the model sees. It knows no model."""

from __future__ import annotations


class Window:
    """The token ids of one sequence, and where in them the model's view begins.

    The view holds at most `limit` ids. Of a longer text the model sees the end. When a text outgrows the view, the older
    half of the view is dropped at once, so that the rest is not computed again for every token. This depends on the sequence
    alone, not on the rows beside it in a batch.
    """

    def __init__(self, ids: list[int], limit: int) -> None:
        self.ids = ids
        self._limit = limit
        self._start = max(0, len(ids) - limit)

    @property
    def view(self) -> list[int]:
        """The ids that the model sees."""
        return self.ids[self._start :]

    def extended(self, token: int) -> Window:
        """A copy with one more token: beams share their past, not their lists."""
        copy = Window(self.ids, self._limit)
        copy.ids, copy._start = [*self.ids, token], self._start
        return copy

    def slide(self) -> bool:
        """Drop the older half of the view if it has outgrown the context; whether it had."""
        if len(self.ids) - self._start <= self._limit:
            return False
        self._start = len(self.ids) - max(1, self._limit // 2)
        return True
