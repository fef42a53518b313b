"""A run's directory: `run.json`, which names the files that the run is in, and these.

A run that is there is replaced in one step, when `run.json` is; any other file is left alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from corrsteer.errors import CorrSteerError
from corrsteer.files import from_json, sync_folder, to_json, write_tensors, write_utf8
from corrsteer.ops import Moments
from corrsteer.rollouts.rollout_file import write_rollouts
from corrsteer.runs.activations import Activations, Block
from corrsteer.runs.file_stamps import stamp_of
from corrsteer.runs.pooling import POOLINGS
from corrsteer.runs.stored_rollouts import StoredRollouts
from corrsteer.stats.evidence import Evidence

FORMAT = "corrsteer.run/4"
INDEX, NEXT = "run.json", "run.json.next"  # what a run is made of, and the same of one that is being written
KINDS = {"moments": Moments, "evidence": Evidence, "residuals": Moments}  # what is kept of each layer and pooling
OWN = re.compile(  # a run's files, and no other
    rf"(layer_\d+\.({'|'.join(POOLINGS)})(\.evidence|\.residuals)?|rewards|activations_\d+)(\.\d+)?\.safetensors"
    r"|rollouts(\.\d+)?\.jsonl"
)

State = Moments | Evidence
States = dict[int, dict[str, Any]]  # layer -> pooling -> state


def save(directory: Path, described: dict[str, Any], parts: Mapping[str, Any]) -> dict[Any, str]:
    """Write a run, and say which file each part is in; see `Run.save`.

    Parameters
    ----------
    described : what JSON can hold; under `layers` an entry for each.
    parts : states by kind (see `KINDS`), `rewards` (arrays), `rollouts` and `activations`.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(directory, error) from None
    old = _files_of(directory / INDEX)
    cut_off = _files_of(directory / NEXT) - old  # of a save that did not come to its end
    writers = _writers(parts)
    names = _names(directory, writers, cut_off)
    text = to_json(_index(described, parts, names), indent=2)  # before anything is written or removed
    _remove(directory, cut_off)
    try:
        write_utf8(directory / NEXT, text)
        for part, write in writers.items():
            write(directory / names[part])
        os.replace(directory / NEXT, directory / INDEX)
    except BaseException as error:
        if os.path.lexists(directory / NEXT):  # otherwise it took the place of the old one before the interrupt
            _remove(directory, {NEXT, *names.values()})
        if isinstance(error, OSError):
            raise _unwritable(directory, error) from None
        raise
    sync_folder(directory)
    _remove(directory, old)
    return names


def load(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `save` wrote, as that takes it.

    Raises
    ------
    CorrSteerError : if there is no run of this version.
    FileNotFoundError, SafetensorError, AttributeError, KeyError, TypeError, ValueError : if it is damaged.
    """
    described = from_json((directory / INDEX).read_bytes())
    if described.get("format") != FORMAT:
        raise CorrSteerError(
            f"{directory} is not a run of this version: its format must be {FORMAT!r}, "
            f"got {described.get('format')!r}; collect again"
        )
    if strange := {name for name in _named(described) if not OWN.fullmatch(name)}:
        raise ValueError(f"it names files that are not a run's, {sorted(strange)}")
    layers = {int(layer): entry for layer, entry in described["layers"].items()}
    parts: dict[str, Any] = {kind: _load(directory, layers, kind) for kind in KINDS}
    parts["rewards"] = load_file(str(directory / described["rewards"]))
    parts["rollouts"] = []
    if described["rollouts"] is not None:
        order, samples = parts["rewards"].pop("order").tolist(), parts["rewards"]["rewards"].shape[1]
        if not all(isinstance(sample, int) and 0 <= sample < samples for sample in order):
            raise ValueError(f"its rollouts are not of its {samples} samples")
        path = directory / described["rollouts"]
        parts["rollouts"] = StoredRollouts(path, order, samples, stamp_of(path))
    parts["activations"] = None
    if described["activations"] is not None:
        blocks = [Block.read(directory / name) for name in described["activations"]["blocks"]]
        counts = {name: described["activations"][name] for name in ("permutations", "bootstrap")}
        parts["activations"] = Activations(blocks, **counts)
    return described, parts


@contextlib.contextmanager
def damage(directory: Path) -> Any:
    """Say what is wrong with a directory where reading a run from it fails."""
    try:
        yield
    except CorrSteerError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        if (directory / INDEX).is_file():
            raise CorrSteerError(f"the run in {directory} is damaged ({error}); collect again") from None
        raise CorrSteerError(f"{directory} is not a saved run: it has no {INDEX}") from None
    except (SafetensorError, AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise CorrSteerError(f"the run in {directory} is damaged ({error}); collect again") from None


def _writers(parts: Mapping[str, Any]) -> dict[Any, Callable[[Path], object]]:
    """What writes each part that has a file of its own."""
    writers: dict[Any, Callable[[Path], object]] = {
        (kind, layer, pool): state.save
        for kind in KINDS
        for layer, states in parts[kind].items()
        for pool, state in states.items()
    }
    arrays: dict[str, Tensor] = dict(parts["rewards"])
    if parts["rollouts"]:
        rollouts = [(sample, rollout) for sample, rollout in enumerate(parts["rollouts"]) if rollout is not None]
        arrays["order"] = torch.tensor([sample for sample, _ in rollouts], dtype=torch.int64, device="cpu")
        writers["rollouts"] = lambda path: write_rollouts(path, [rollout for _, rollout in rollouts])
    writers["rewards"] = lambda path: write_tensors(path, arrays, {})
    for block in parts["activations"].blocks if parts["activations"] else ():
        writers["activations", block.number] = block.written
    return writers


def _names(directory: Path, parts: Iterable[Any], reusable: set[str]) -> dict[Any, str]:
    """A file name for every part, none of which is taken."""

    def numbered(number: int) -> dict[Any, str]:
        middle = "" if number == 1 else f".{number}"
        return {part: f"{stem}{middle}.{ending}" for part in parts for stem, ending in [_stem(part)]}

    def free(names: Iterable[str]) -> bool:
        return not any(os.path.lexists(directory / name) for name in set(names) - reusable)

    return next(names for names in map(numbered, itertools.count(1)) if free(names.values()))


def _stem(part: Any) -> tuple[str, str]:
    """A part's file name without a number, and its ending."""
    if isinstance(part, str):
        return part, "jsonl" if part == "rollouts" else "safetensors"
    if part[0] == "activations":
        return f"activations_{part[1]}", "safetensors"
    kind, layer, pool = part
    return f"layer_{layer}.{pool}" + ("" if kind == "moments" else f".{kind}"), "safetensors"


def _index(described: dict[str, Any], parts: Mapping[str, Any], names: Mapping[Any, str]) -> dict[str, Any]:
    """`run.json`: what is described, and the files that the rest is in."""
    layers = {
        layer: entry
        | {kind: {pool: names[kind, int(layer), pool] for pool in parts[kind].get(int(layer), ())} for kind in KINDS}
        for layer, entry in described["layers"].items()
    }
    activations = parts["activations"]
    return {
        "format": FORMAT,
        **described,
        "layers": layers,
        "rewards": names["rewards"],
        "rollouts": names.get("rollouts"),
        "activations": activations
        and {
            "blocks": [names["activations", block.number] for block in activations.blocks],
            "permutations": activations.permutations,
            "bootstrap": activations.bootstrap,
        },
    }


def _load(directory: Path, layers: Mapping[int, Any], kind: str) -> States:
    """What was kept of one kind, of the layers of which something was."""
    return {
        layer: {pool: KINDS[kind].load(directory / name) for pool, name in entry[kind].items()}
        for layer, entry in layers.items()
        if entry[kind]
    }


def _named(described: dict[str, Any]) -> set[str]:
    """The files that a run's description names."""
    kinds = (entry[kind] for entry in described["layers"].values() for kind in KINDS)
    blocks = (described.get("activations") or {"blocks": ()})["blocks"]
    others = {described["rewards"], described.get("rollouts"), *blocks} - {None}
    return {*others, *(name for names in kinds for name in names.values())}


def _files_of(index: Path) -> set[str]:
    """The same of a description on disk, as far as it can be read and names files as a run does."""
    try:
        return {name for name in _named(from_json(index.read_bytes())) if OWN.fullmatch(name)}
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return set()


def remove_parts(directory: Path) -> None:
    """Remove what savers left that died before a file was whole; nobody may be saving there now."""
    for path in directory.glob(".*.part"):
        name = path.name[1:].rsplit(".", 2)[0]
        if name in (INDEX, NEXT) or OWN.fullmatch(name):
            path.unlink(missing_ok=True)


def _remove(directory: Path, names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError):
            (directory / name).unlink(missing_ok=True)


def _unwritable(directory: Path, error: OSError) -> CorrSteerError:
    return CorrSteerError(f"{directory} cannot be written to ({error}); give another directory")
