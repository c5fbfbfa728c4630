"""Texts out of a Parquet file: one row, one document. A batch of rows is in memory at a time."""

from collections.abc import Iterator
from pathlib import Path

from preparation.streams import PIECE_BYTES, need
from runtime.errors import UserError

_BATCH_ROWS = 64


def texts(path: Path, field: str, first_row: int) -> Iterator[tuple[bytes, int, int]]:
    """Each row's text from `first_row` on, the number of the row after it, and the bytes of the file behind it, about.

    A missing value (null) is a text without bytes. Raises UserError.
    """
    arrow, parquet = need("pyarrow", ".parquet files"), need("pyarrow.parquet", ".parquet files")
    try:
        with parquet.ParquetFile(path, buffer_size=PIECE_BYTES, pre_buffer=False) as file:
            binary = _binary_type(arrow, file.schema_arrow, field, path)
            rows, size = file.metadata.num_rows, path.stat().st_size
            row, groups = _first_group(file.metadata, first_row)
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=[field], use_threads=False):
                for text in batch.column(0).cast(binary).to_pylist():
                    row += 1
                    if row > first_row:
                        yield text or b"", row, size * row // rows
    except (OSError, arrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"expected a readable, whole file, got {path} ({reason}): mend it or leave it out") from None


def _first_group(metadata, first_row: int) -> tuple[int, list[int]]:
    """The first row of the group that holds `first_row`, and that group and those after it."""
    row = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if first_row < row + rows:
            return row, list(range(group, metadata.num_row_groups))
        row += rows
    return row, []


def _binary_type(arrow, schema, field: str, path: Path):
    """What to read a column of texts as: their bytes, without decoding them."""
    if field not in schema.names:
        raise UserError(f"expected the column {field!r} (--text_field) in {path}, got {', '.join(schema.names)[:120]}")
    kind = schema.field(field).type
    if kind in (arrow.string(), arrow.binary()):
        return arrow.binary()
    if kind in (arrow.large_string(), arrow.large_binary()):
        return arrow.large_binary()
    raise UserError(f"expected texts in the column {field!r} of {path}, got {kind}: choose another --text_field")
