"""Cells of a CSV or Parquet file as text, exactly as they stand, before anybody decides what they mean.

Nothing here infers a type: a patient number keeps its leading zeros and 9007199254740993 its last digit.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcrage.data.problems import problem
from mcrage.errors import DataError, Problem

Cells = NDArray[np.object_]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_DELIMITER_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_MAGIC = {
    b"\x1f\x8b": ("it is compressed with gzip", "Name it .csv.gz."),
    b"PK\x03\x04": ("it is a zip archive or an Excel workbook", "Unpack it, or save the sheet as CSV."),
    b"\xd0\xcf\x11\xe0": ("it is an old Excel workbook", "Save the sheet as CSV."),
    b"PAR1": ("it is a Parquet file", "Name it .parquet."),
}
_BATCH = 10_000
_EXACT_FLOAT = 2.0**53


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """A file's cells as text.

    Attributes:
        header: Column names as they stand in the file.
        cells: Texts of each column of the header, all of one length; None where the file itself stores a null.
        iso_dates: Positions of columns that the file stores as dates; their texts are ``YYYY-MM-DD``.
        total: Rows of the file, with those that ``problems`` are about.
        problems: Rows that are left out of ``cells`` because they do not fit the header.
    """

    header: tuple[str, ...]
    cells: tuple[Cells, ...]
    iso_dates: frozenset[int] = frozenset()
    total: int
    problems: tuple[Problem, ...] = ()


def read_text(path: str | Path) -> TextTable:
    """The cells of a ``.csv``, ``.csv.gz``, ``.tsv``, ``.tsv.gz`` or ``.parquet`` file as text.

    Raises:
        DataError: If the file as a whole cannot be read.
    """
    path = Path(path)
    raw = _bytes(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        raw, suffixes = _unzipped(raw), suffixes[:-1]
    suffix = suffixes[-1] if suffixes else ""
    if suffix == ".parquet":
        return _parquet(raw)
    if suffix not in _DELIMITERS:
        kinds = ".csv, .csv.gz, .tsv, .tsv.gz or .parquet"
        raise _error("E104", reason="its name does not say what it is", fix=f"Name it {kinds}.")
    return _csv(_decoded(raw), _DELIMITERS[suffix])


def _error(code: str, **fields: Any) -> DataError:
    return DataError([problem(code, **fields)])


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _error("E101") from None
    except OSError as error:
        raise _error("E102", reason=(error.strerror or "unknown reason").lower()) from None


def _unzipped(raw: bytes) -> bytes:
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error):
        raise _error(
            "E104", reason="it is not compressed with gzip, or is cut off", fix="Compress or copy it again."
        ) from None


def _decoded(raw: bytes) -> str:
    for magic, (reason, fix) in _MAGIC.items():
        if raw.startswith(magic):
            raise _error("E104", reason=reason, fix=fix)
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _error("E103", reason="it is UTF-16")
    if not raw.strip():
        raise _error("E106")
    if b"\0" in raw:
        raise _error("E108", offset=raw.index(b"\0"))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _error("E103", reason=f"the first wrong byte is number {error.start:,}") from None


def _csv(text: str, delimiter: str) -> TextTable:
    rows = _records(text, delimiter)
    header = next(rows, (0, []))[1]
    _check_delimiter(header, delimiter)
    cells: list[list[str]] = [[] for _ in header]
    misfits: dict[str, list[int]] = {}
    known: dict[str, str] = {}
    batch: list[list[str]] = []
    total = 0

    def move() -> None:
        # One string object per distinct text: a table of codes would else take ten times its size in memory.
        for column, texts in zip(cells, zip(*batch, strict=True), strict=False):
            column.extend(map(known.setdefault, texts, texts))
        batch.clear()

    for line, row in rows:
        total += 1
        if code := _misfit(row, header):
            misfits.setdefault(code, []).append(line)
            continue
        batch.append(row)
        if len(batch) == _BATCH:
            move()
    move()
    if not total:
        raise _error("E107")
    return TextTable(
        header=tuple(header),
        cells=tuple(np.array(column, dtype=object) for column in cells),
        total=total,
        problems=tuple(
            problem(code, rows=len(lines), total=total, line=lines[0]) for code, lines in sorted(misfits.items())
        ),
    )


def _records(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Records that are not blank, each with the number of the line that it ends in."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    end = 0
    try:
        for row in reader:
            end = reader.line_num
            if row:
                yield end, row
    except csv.Error:
        raise _error("E111", line=end + 1) from None


def _check_delimiter(header: list[str], delimiter: str) -> None:
    if len(header) != 1:
        return
    counts = {other: header[0].count(other) for other in _DELIMITER_NAMES if other != delimiter}
    likely = max(counts, key=lambda other: counts[other])
    if counts[likely]:
        raise _error("E105", found=_DELIMITER_NAMES[likely], expected=_DELIMITER_NAMES[delimiter])


def _misfit(row: list[str], header: list[str]) -> str:
    if len(row) != len(header):
        return "E109" if len(row) > len(header) else "E110"
    return "E112" if row == header else ""


def _parquet(raw: bytes) -> TextTable:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise _error("E113") from None
    try:
        table = pq.ParquetFile(pa.BufferReader(raw)).read()
    except (pa.ArrowException, OSError):
        raise _error("E104", reason="it is not a Parquet file, or is damaged", fix="Export it again.") from None
    if not table.num_rows:
        raise _error("E107")
    cells, problems, dates = [], [], set()
    for position, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
        try:
            cells.append(_arrow_text(column))
        except pa.ArrowException:
            cells.append(np.full(table.num_rows, None, dtype=object))
            problems.append(problem("E114", column=name, reason=str(column.type)))
        if pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
            dates.add(position)
    return TextTable(
        header=tuple(table.column_names),
        cells=tuple(cells),
        iso_dates=frozenset(dates),
        total=table.num_rows,
        problems=tuple(problems),
    )


def _arrow_text(column: Any) -> Cells:
    """An Arrow column as text: shortest exact digits, whole numbers without a point, dates as ``YYYY-MM-DD``."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
        values = column.drop_null().to_numpy()
        if np.all((np.abs(values) < _EXACT_FLOAT) & (values == np.trunc(values))):
            column = column.cast(pa.int64())
    elif pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
        column = pc.strftime(column, format="%Y-%m-%d")
    texts: Cells = column.cast(pa.string()).to_numpy(zero_copy_only=False)
    return texts
