"""Window: the ids of one growing sequence, and which of them the model sees. It depends on no other module."""

from __future__ import annotations


class Window:
    """The token ids of one sequence, and the start of the part that the model sees.

    The model sees the last ids, at most `limit`. When they become more, the older half is dropped at once: the model must
    then recompute the other half, and should not do so for every token. Where the window slides depends on the sequence
    only, not on the other rows of a batch.
    """

    def __init__(self, ids: list[int], limit: int) -> None:
        self.ids = ids
        self._limit = limit
        self._start = max(0, len(ids) - limit)

    @property
    def visible_ids(self) -> list[int]:
        """The ids that the model sees."""
        return self.ids[self._start :]

    def extended(self, token: int) -> Window:
        """Return a copy with one more token. Beams with a common beginning need separate lists."""
        copy = Window(self.ids, self._limit)
        copy.ids, copy._start = [*self.ids, token], self._start
        return copy

    def slide(self) -> bool:
        """Drop the older half of the visible ids if there are more than `limit`. Returns whether it did."""
        if len(self.ids) - self._start <= self._limit:
            return False
        self._start = len(self.ids) - max(1, self._limit // 2)
        return True
