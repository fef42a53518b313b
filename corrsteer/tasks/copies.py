"""`Copy`: the files of a benchmark, on the hub or where a user has them."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from corrsteer.arguments import as_path
from corrsteer.tasks import layouts
from corrsteer.tasks.graders import TaskError
from corrsteer.tasks.hub import fetch
from corrsteer.tasks.layouts import WHOLE, Layout, Row


class Copy:
    """The rows of a benchmark's parts.

    Parameters
    ----------
    name : of the benchmark.
    known : layouts of copies; the first is that of the hub.
    hub, revision : of its dataset, if it has one.
    data : a file, whose rows are not divided, or a folder; None for the hub.

    Raises
    ------
    TaskError : for a folder of another layout, and for no data where there is no dataset on the hub.
    """

    def __init__(self, name: str, known: Sequence[Layout], hub: str | None, revision: str | None, data: Any):
        self._name, self._hub, self._revision = name, hub, revision
        self.dataset: str | None = None  # once rows are read from the hub, with the commit where that is known
        self._data = None if data is None else as_path("data", data)
        if self._data is None:
            if hub is None or not known:
                raise TaskError(f"data must be given, as {name} is not on the hub: --data PATH")
            self._layout = known[0]
        elif self._data.is_file():
            self._layout = replace(_layout_of(self._data, known), parts={WHOLE: [glob.escape(self._data.name)]})
            self._data = self._data.parent
        else:
            self._layout = layouts.find(self._data, known)

    def has(self, part: str) -> bool:
        """Whether it has a part of its own by that name."""
        if part not in self._layout.parts:
            return False
        return self._data is None or bool(self._layout.files(self._data, part))

    def rows(self, part: str) -> Iterator[tuple[str, Row]]:
        """The rows of a part by their columns, each with where it stood, which no other row has.

        Raises
        ------
        TaskError : for a part without a file, and for a file that cannot be read.
        """
        patterns = self._layout.parts.get(part, ())
        folder = self._data or fetch(str(self._hub), patterns, self._revision)
        if self._data is None:
            self.dataset = f"{self._hub}@{folder.name}" if folder.parent.name == "snapshots" else self._hub
        files = self._layout.files(folder, part) if patterns else []
        if not files:
            named = " or ".join(patterns) or f"{part} part"
            raise TaskError(f"the {part} part of {self._name} is missing: {folder} has no {named}")
        for path in files:
            yield from layouts.read(path, self._layout, path.relative_to(folder).as_posix())


def _layout_of(file: Path, known: Sequence[Layout]) -> Layout:
    """The layout that a file by itself is of: one with columns where its name fits, as it has no header then."""
    for layout in known:
        names = [pattern.rpartition("/")[2] for patterns in layout.parts.values() for pattern in patterns]
        if layout.columns and any(file.match(name) for name in names if not name.startswith("*.")):
            return layout
    return Layout({})
