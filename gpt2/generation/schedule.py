"""Schedule: which rows of many prompts run at a time. It depends on `Batch` and rows, not on text."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from gpt2.generation.batch import Batch
from gpt2.generation.row import Row

# How many prompts, per place of the batch, are read beyond the first one that has not ended. Results come in order, so one
# long text makes those of the prompts after it wait in memory.
_READ_AHEAD = 16


def in_order(
    batch: Batch, prompts: Iterable[Sequence[Row]], *, batch_size: int, read: Callable[[Row], object] = lambda row: None
) -> Iterator[Sequence[Row]]:
    """Continue the rows of many prompts, at most `batch_size` at a time, and yield those of each prompt in order.

    `prompts` has the rows that `start` made of each prompt. It is read as rows end, and each row that ends makes place for
    the next one. `read` is called with each row that got a token; it may end the row by setting its `finish_reason`. A row
    of a beam search counts as one for each beam. If there are more beams than `batch_size`, the search runs alone.
    """
    remaining, unfinished = iter(prompts), deque[Sequence[Row]]()
    waiting = deque[Sequence[Row]]()  # rows that are admitted together: one, or all of a beam search
    n_running = 0
    while True:
        while True:
            if not waiting:
                rows = next(remaining, None) if len(unfinished) < _READ_AHEAD * batch_size else None
                if rows is None:
                    break
                unfinished.append(rows)
                waiting.extend([rows] if rows[0].config.num_beams > 1 else ([row] for row in rows))
            n_places = waiting[0][0].config.num_beams
            if n_running and n_running + n_places > batch_size:
                break
            n_running += n_places
            batch.admit(waiting.popleft())
        if not n_running:
            return
        for advanced in batch.step():
            for row in advanced:
                read(row)
        live = {id(row.prompt_ids) if row.config.num_beams > 1 else id(row): row.config.num_beams for row in batch.rows}
        n_running = sum(live.values())
        while unfinished and all(row.finish_reason for row in unfinished[0]):
            yield unfinished.popleft()
