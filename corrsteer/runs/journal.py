"""What a collection that is under way has on disk: batches, and the blocks that are made of them.

A batch is its rollouts, its pooled activations as sparse rows, and its residuals. Once all of a block are there, they
become the block's rollouts, its rows, and moments of its residuals. So a collection that goes on folds in blocks as
they lie, and comes to the same bits as one that was never stopped. Where rows are not kept, blocks are folded into a
state that is saved now and then, and their rows are removed.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from corrsteer.errors import CorrSteerError
from corrsteer.files import from_json, to_json, write_tensors, write_utf8
from corrsteer.ops import Moments
from corrsteer.ops.rows import SparseRows
from corrsteer.rollouts.journal import Journal
from corrsteer.rollouts.rollout import Rollout
from corrsteer.rollouts.rollout_file import read_rollouts
from corrsteer.runs.activations import Block
from corrsteer.runs.batches import Batch, Pooled
from corrsteer.runs.run import Run, snapshot_of
from corrsteer.stats.evidence import Evidence

FOLDER = "collecting"
STATE = "state.json"
PARTS = ("values", "features", "offsets")
EVERY, SHARE = 60.0, 20.0  # seconds between states at least, and times what it takes to save one

Residuals = dict[int, dict[str, Moments]]  # layer -> pooling -> of a block


@dataclass
class CollectionJournal:
    """A journal whose units are batches and blocks."""

    journal: Journal
    devices: Mapping[int, torch.device]
    _saved: float = field(default_factory=time.monotonic)
    _took: float = 0.0

    @property
    def folder(self) -> Path:
        """Where everything lies."""
        return self.journal.folder

    def has(self, number: int, batch: int) -> bool:
        """Whether a batch of a block is there, or the whole block."""
        return self.has_block(number) or self.journal.has(batch_name(number, batch))

    def has_block(self, number: int) -> bool:
        """Whether a block is there."""
        return self.journal.has(_block(number))

    def write(self, number: int, at: int, batch: Batch) -> None:
        """Have a batch on the disk: its rollouts last, which say that it is whole."""
        name = batch_name(number, at)
        tensors: dict[str, Tensor] = {}
        widths = {layer: z.shape[1] for layer, pools in batch.pooled.items() for z in pools.values()}
        for layer, pools in batch.pooled.items():
            for pool, z in pools.items():
                rows = SparseRows.from_dense(z).to("cpu")
                tensors |= {f"{layer}.{pool}.{part}": tensor for part, tensor in rows.tensors().items()}
        for layer, pools in batch.residuals.items():
            tensors |= {f"{layer}.{pool}.residual": x.cpu() for pool, x in pools.items()}
        write_tensors(self._tensors(name), tensors, {"d_sae": to_json(widths)})
        self.journal.write(name, _lines(batch.rollouts))

    def read(self, number: int, at: int) -> Batch:
        """A batch that is there.

        Raises
        ------
        CorrSteerError : for one that is damaged.
        """
        name = batch_name(number, at)
        pooled: Pooled = {}
        residuals: Pooled = {}
        with _named(self._tensors(name)) as path, safe_open(str(path), framework="pt", device="cpu") as file:
            widths = from_json(file.metadata()["d_sae"])
            for key in file.keys():
                layer, pool, part = key.split(".")
                device = self.devices[int(layer)]
                if part == "residual":
                    residuals.setdefault(int(layer), {})[pool] = file.get_tensor(key).to(device)
                elif part == "values":
                    parts = {part: file.get_tensor(f"{layer}.{pool}.{part}") for part in PARTS}
                    rows = SparseRows.from_tensors(parts, widths[layer])
                    pooled.setdefault(int(layer), {})[pool] = rows.dense(device=device)
        return Batch(pooled, residuals, read_rollouts(self.journal.path(name)))

    def write_block(self, block: Block, residuals: Residuals, rollouts: Sequence[Rollout], batches: int) -> Block:
        """Have a block on the disk, and remove its batches; it is given back as it is read from there."""
        name = _block(block.number)
        stored = block.written(self._tensors(name))
        tensors = {
            f"{layer}.{pool}.{part}": tensor.cpu()
            for layer, pools in residuals.items()
            for pool, moments in pools.items()
            for part, tensor in zip(Moments.STATE, moments.state())
        }
        write_tensors(self._residuals(name), tensors, {})
        self.journal.write(name, _lines(rollouts))
        for at in range(batches):
            for path in (self.journal.path(batch_name(block.number, at)), self._tensors(batch_name(block.number, at))):
                path.unlink(missing_ok=True)
        return stored

    def read_block(self, number: int) -> tuple[Block, Residuals, list[Rollout]]:
        """A block that is there.

        Raises
        ------
        CorrSteerError : for one that is damaged.
        """
        name = _block(number)
        residuals: Residuals = {}
        with _named(self._residuals(name)) as path, safe_open(str(path), framework="pt", device="cpu") as file:
            for key in file.keys():
                layer, pool = key.split(".")[:2]
                if pool not in residuals.setdefault(int(layer), {}):
                    parts = [file.get_tensor(f"{layer}.{pool}.{part}") for part in Moments.STATE]
                    residuals[int(layer)][pool] = Moments.fitting([t.to(self.devices[int(layer)]) for t in parts])
        with _named(self._tensors(name)):
            return Block.read(self._tensors(name)), residuals, self.rollouts(number)

    def rollouts(self, number: int) -> list[Rollout]:
        """Those of a block that is there."""
        return read_rollouts(self.journal.path(_block(number)))

    def save_state(self, run: Run, folded: Sequence[int], *, now: bool = False) -> None:
        """Save what blocks were folded into, if it is time to, and remove their rows."""
        if not now and time.monotonic() - self._saved < max(EVERY, SHARE * self._took):
            return
        started = time.monotonic()
        place = self.folder / f"state_{len(folded)}"
        shutil.rmtree(place, ignore_errors=True)  # of one that was not saved to its end
        place.mkdir()
        for kind, layer, pool, state in _states(run):
            state.save(place / f"{kind}.{layer}.{pool}.safetensors")
        described = {
            "place": place.name, "folded": list(folded), "notes": run.notes,
            "snapshots": [asdict(snapshot) for snapshot in run.snapshots],
        }  # fmt: skip
        write_utf8(self.folder / STATE, to_json(described))
        for number in folded:
            for path in (self._tensors(_block(number)), self._residuals(_block(number))):
                path.unlink(missing_ok=True)
        for other in self.folder.glob("state_*"):
            if other != place:
                shutil.rmtree(other, ignore_errors=True)
        self._saved = time.monotonic()
        self._took = self._saved - started

    @property
    def has_state(self) -> bool:
        """Whether a state was saved."""
        return (self.folder / STATE).exists()

    def load_state(self, run: Run) -> list[int]:
        """Bring a run to the state that was saved last, and say which blocks are in it.

        Raises
        ------
        CorrSteerError : for one that is damaged.
        """
        path = self.folder / STATE
        if not path.exists():
            return []
        with _named(path, "begin anew"):  # the rows that are in it are no longer there
            described = from_json(path.read_bytes())
            place = self.folder / described["place"]
            for kind, layer, pool, state in list(_states(run)):
                loaded = type(state).load(place / f"{kind}.{layer}.{pool}.safetensors", device=state.device)
                getattr(run, kind)[layer][pool] = loaded
            run.notes = described["notes"] + [note for note in run.notes if note not in described["notes"]]
            run.snapshots = [snapshot_of(entry) for entry in described["snapshots"]]
            return list(described["folded"])

    def _tensors(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _residuals(self, name: str) -> Path:
        return self.folder / f"{name}.residuals.safetensors"


def batch_name(number: int, batch: int) -> str:
    """What a batch of a block is called in the journal."""
    return f"batch_{number}.{batch}"


def _block(number: int) -> str:
    return f"block_{number}"


def _states(run: Run) -> Iterator[tuple[str, int, str, Moments | Evidence]]:
    for kind in ("moments", "residuals", "evidence"):
        for layer, pools in getattr(run, kind).items():
            for pool, state in pools.items():
                yield kind, layer, pool, state


def _lines(rollouts: Iterable[Rollout]) -> str:
    return "".join(rollout.to_line() for rollout in rollouts)


@contextlib.contextmanager
def _named(path: Path, remedy: str | None = None) -> Iterator[Path]:
    """A file, whose damage is said to be its; by default what it is part of can be made again."""
    try:
        yield path
    except CorrSteerError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        marker = path.name.split(".residuals")[0].removesuffix(".safetensors") + ".jsonl"
        remedy = remedy or f"remove {path.parent / marker}, so that it is made again"
        raise CorrSteerError(f"{path} is damaged ({error}); {remedy}") from None
