"""Rows of a benchmark's files, in the layouts that publishers use: parquet, JSON Lines, JSON and CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corrsteer.tasks.graders import TaskError, one_line

Row = dict[str, Any]

WHOLE = "whole"  # the part of a benchmark that its publisher has not divided
SHOTS = "shots"  # the part that k-shot examples are taken from
PARTS = ("train", "validation", "test")
ENDINGS = (".parquet", ".jsonl", ".json", ".csv")


@dataclass(frozen=True)
class Layout:
    """Which files of a copy hold which part.

    Attributes
    ----------
    parts : of each part the patterns, as of `Path.glob`, of its files. A part is `train`, `validation`, `test`,
        `shots`, or `whole` where there is no division.
    columns : of CSV files without a header.
    file_column : the column that a file's folder and name are put in, without its ending, where they say something:
        ``dev/law_dev``.
    """

    parts: Mapping[str, Sequence[str]]
    columns: tuple[str, ...] = ()
    file_column: str | None = None

    def files(self, folder: Path, part: str) -> list[Path]:
        """The files of a part that are there, in order."""
        return sorted({path for pattern in self.parts[part] for path in folder.glob(pattern) if path.is_file()})


# What copies look like that somebody made: a file or folder a part, or nothing but files.
COMMON = (
    Layout({part: [f"{part}{ending}" for ending in ENDINGS] + [f"{part}/*{end}" for end in ENDINGS] for part in PARTS}),
    Layout({WHOLE: [f"*{ending}" for ending in ENDINGS]}),
)


def find(folder: Path, layouts: Sequence[Layout]) -> Layout:
    """Of the layouts, or those that anybody would make, the first that a folder has files of the most parts of.

    Raises
    ------
    TaskError : for a folder that is none, or has files of no layout.
    """
    if not folder.is_dir():
        raise TaskError(f"data must be a file or a folder that is there, got {str(folder)!r}")
    known = (*layouts, *COMMON)
    parts = [sum(bool(layout.files(folder, part)) for part in layout.parts) for layout in known]
    if any(parts):
        return known[parts.index(max(parts))]
    wanted = [pattern for layout in layouts for patterns in layout.parts.values() for pattern in patterns]
    there = sorted(path.name for path in folder.iterdir())
    raise TaskError(
        f"data {folder} has none of the files {', '.join(wanted) or ', '.join('*' + end for end in ENDINGS)}; it has "
        f"{', '.join(there[:5]) or 'nothing'}{' and more' if len(there) > 5 else ''}"
    )


def read(path: Path, layout: Layout, name: str | None = None) -> Iterator[tuple[str, Row]]:
    """Rows of a file by their columns, each with where it stood: ``test.csv:3`` is the third.

    Parameters
    ----------
    name : what to call the file; by default its own name.

    Raises
    ------
    TaskError : for a file that is of no kind that is known, or cannot be read as what it is.
    """
    name = name or path.name
    if path.suffix not in ENDINGS:
        raise TaskError(f"{name} must end with {', '.join(ENDINGS)}, got {path.suffix!r}")
    try:
        for number, row in enumerate(_rows(path, layout.columns), start=1):
            if not isinstance(row, dict):
                raise TaskError(f"{name}:{number}: a row must have named columns, got {type(row).__name__}")
            folder = path.absolute().parent.name
            named = {} if layout.file_column is None else {layout.file_column: f"{folder}/{path.stem}"}
            yield f"{name}:{number}", named | row
    except TaskError:  # which is a ValueError, and says what is wrong
        raise
    except (OSError, ValueError, RecursionError, csv.Error) as error:  # Arrow's errors are some of these
        raise TaskError(f"{name} cannot be read as {path.suffix[1:]}: {one_line(error)}") from error


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[Any]:
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8-sig") as file:
            yield from _json_lines(file)
    elif path.suffix == ".json":
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        yield from found if isinstance(found, list) else [found]
    else:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _csv_rows(file, columns)


def _json_lines(file: Iterable[str]) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        try:
            if line.strip():
                yield json.loads(line.rstrip())
        except json.JSONDecodeError as error:  # which knows only its own line
            raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error


def _csv_rows(file: Any, columns: tuple[str, ...]) -> Iterator[Row]:
    for row in csv.DictReader(file, columns or None):  # which takes odd quotes, as the publishers' own readers do
        if None in row or None in row.values():  # more cells than columns, or fewer
            raise csv.Error(f"line of {sum(cell is not None for cell in row.values())} cells, not {len(row)}: {row}")
        yield row


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise TaskError(f"{path.name} needs the pyarrow package: pip install 'corrsteer[datasets]'") from error
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()
