"""The material of a page: runs, steerings and evaluations, from files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corrsteer.arguments import as_path
from corrsteer.errors import CorrSteerError
from corrsteer.experiments.evaluation import Evaluation
from corrsteer.runs.peaks import Extreme
from corrsteer.runs.run import Run
from corrsteer.runs.run_files import INDEX
from corrsteer.steering.steering import Steering
from corrsteer.types import PathLike

STAGES = "stages.json"  # of a directory that `corrsteer run` fills
EVALUATIONS = "corrsteer.evaluations/"  # what their format begins with


@dataclass(frozen=True)
class Compared:
    """Steerings that were evaluated together.

    Attributes
    ----------
    evaluations : by the steering's name.
    baselines : those of the names that are baselines, and what is known of each.
    digests : `Steering.digest` of each name, where that was recorded.
    """

    evaluations: Mapping[str, Evaluation]
    baselines: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Material:
    """What a page is about, each by its name: a path, or what else its owner calls it.

    Attributes
    ----------
    stages : of each run, seconds that each step of `corrsteer run` took.
    read_again : gives completions of a run, in which a feature of a layer is most or least active, with its activation
        at each token, as `with_peaks` does; None where no model is there to read them.
    """

    runs: Mapping[str, Run]
    steerings: Mapping[str, Steering] = field(default_factory=dict)
    compared: Mapping[str, Compared] = field(default_factory=dict)
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    read_again: Callable[[Run, int, int, list[Extreme]], list[Extreme]] | None = None

    def steering_of(self, compared: Compared, name: str) -> Steering | None:
        """The steering of an evaluation: by its digest, or by its file's name."""
        digest = compared.digests.get(name)
        for path, steering in self.steerings.items():
            same = Path(path).name == Path(name).name if digest is None else steering.digest == digest
            if same:
                return steering
        return None


def find(
    runs: Sequence[PathLike], steerings: Iterable[PathLike] = (), evaluations: Iterable[PathLike] = ()
) -> Material:
    """Read what is named, and the steerings and evaluations that lie in the runs' directories.

    Raises
    ------
    CorrSteerError : for a file that is named and is not what it should be; what lies about and is something else is
        passed over.
    """
    if not runs:
        raise CorrSteerError("runs must be one or more directories that corrsteer collect wrote, got none")
    directories = [as_path("run", run) for run in runs]
    loaded = {str(path): Run.load(path) for path in directories}
    named = {str(path): Steering.load(path) for path in steerings}
    compared = {str(path): read_evaluations(as_path("evaluation", path)) for path in evaluations}
    known = {Path(path).resolve() for path in (*named, *compared)}
    for directory in directories:
        for path in sorted(directory.iterdir()):
            if path.resolve() in known or path.name == INDEX:
                continue
            if path.suffix == ".safetensors" and (steering := _steering(path)) is not None:
                named[str(path)] = steering
            elif path.suffix == ".json" and (found := _evaluations(path)) is not None:
                compared[str(path)] = found
    stages = {str(path): found for path in directories if (found := read_stages(path / STAGES))}
    return Material(loaded, named, compared, stages)


def read_stages(path: Path) -> dict[str, float]:
    """Seconds that each step of `corrsteer run` has taken so far; none where there is no such file.

    Raises
    ------
    CorrSteerError : for a file that is damaged.
    """
    try:
        return {str(stage): float(seconds) for stage, seconds in json.loads(path.read_bytes()).items()}
    except FileNotFoundError:
        return {}
    except (AttributeError, TypeError, ValueError):
        raise CorrSteerError(f"{path} is damaged; remove it, as it holds only how long each step took") from None


def read_evaluations(path: Path) -> Compared:
    """What `corrsteer evaluate --out` wrote.

    Raises
    ------
    CorrSteerError : for any other file.
    """
    try:
        described = json.loads(path.read_bytes())
        if not str(described["format"]).startswith(EVALUATIONS):
            raise ValueError(f"its format is {described['format']!r}")
        begun = described.get("begun") or {}
        return Compared(
            {name: Evaluation.from_dict(of_one) for name, of_one in described["steerings"].items()},
            described.get("baselines", {}),
            {name: one["digest"] for name, one in begun.get("steerings", {}).items()},
        )
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorrSteerError(
            f"evaluation must be a file that `corrsteer evaluate --out` wrote, got {path} ({error}); evaluate again"
        ) from None


def _steering(path: Path) -> Steering | None:
    try:
        return Steering.load(path)
    except CorrSteerError:  # one of the run's own files, or of an older version
        return None


def _evaluations(path: Path) -> Compared | None:
    try:
        return read_evaluations(path)
    except CorrSteerError:
        return None
