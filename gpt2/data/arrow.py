"""Read rows of Parquet and Arrow files in batches, and write Parquet, with pyarrow. It does not know what columns mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2.data.kind import PARQUET
from gpt2.data.source import Source
from gpt_config.errors import DataError, InputError

_ROWS = 1024  # rows in memory at a time


def arrow_rows(source: Source, kind: str, column: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("row N", values by column). With `column`, only that column is read, if there is one of that name.

    DataError if pyarrow is missing, or if the file is damaged.
    """
    try:
        import pyarrow as pa
    except ImportError:
        raise DataError(
            f"reading {source.name} needs the package pyarrow: pip install pyarrow, or convert the file to JSONL"
        ) from None
    number = 0
    try:
        for batch in _batches(source, kind, column):
            for values in batch.to_pylist():
                number += 1
                yield f"row {number}", values
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {source.name} ({error}): check the file") from None


def _batches(source: Source, kind: str, column: str | None) -> Iterator[Any]:
    import pyarrow as pa

    with source.seekable() as file:
        if kind == PARQUET:
            from pyarrow import parquet

            table = parquet.ParquetFile(file)
            names = [column] if column in table.schema_arrow.names else None
            yield from table.iter_batches(batch_size=_ROWS, columns=names)
            return
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        batches = (reader.get_batch(place) for place in range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS):
                part = batch.slice(start, _ROWS)
                yield part.select([column]) if column in part.schema.names else part


def check_can_write(path: Path) -> None:
    """Raise InputError, which names `path` and the extra, if pyarrow is missing."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise InputError(
            f"writing {path} needs the package pyarrow: pip install '.[data]', or name a .jsonl or .npy file"
        ) from None


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]], name: str, vectors: NDArray[np.float32]) -> None:
    """Write `columns`, and the rows of `vectors` (N, C) as lists of C numbers in the column `name`.

    InputError if a column has values of several kinds.
    """
    import pyarrow as pa
    from pyarrow import parquet

    arrays = {}
    for column, values in columns.items():
        try:
            arrays[column] = pa.array(values)
        except (pa.ArrowException, OverflowError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"the field {column!r} cannot be a column of Parquet ({reason}): remove it, or write .jsonl"
            ) from None
    arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    parquet.write_table(pa.table(arrays), path)
