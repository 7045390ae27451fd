"""Tables of a run: read whole, a damaged one as one message."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.errors import DataError
from lorasmith.files.inputs import read_input

if TYPE_CHECKING:
    import pyarrow as pa


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file as a table, with these columns or with all.

    Raises `DataError` for a file that is damaged, is no Parquet file, or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = read_input(path)
    try:
        # From memory: what pyarrow raises for damaged pages is then no failure of the disk.
        table = pq.read_table(pa.BufferReader(content), columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise not_a_table(path, error, columns) from error
    missing = [name for name in columns or () if name not in table.column_names]
    if missing:
        raise not_a_table(path, f"it has no column {missing[0]!r}", columns)
    return table


def not_a_table(path: Path, why: object, columns: Sequence[str] | None) -> DataError:
    """The message about a file that is not the table of a validation."""
    named = f", with the columns {', '.join(columns)}" if columns else ""
    return DataError(
        f"this is not a table of a validation: {' '.join(str(why).split())}",
        where=path,
        expected=f"a Parquet file as `lorasmith validate` writes it{named}",
        remedy="validate again, or fetch the file anew",
    )
