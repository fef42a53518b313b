"""`collect`: generate, grade, and fold the activations of every kept step into moments and evidence, one per layer."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

import corrsteer
from corrsteer import backends, inference, models, ops, stability
from corrsteer import scores as scores_
from corrsteer.capture import KEPT_POSITIONS, Capture
from corrsteer.encoder import SIGNED, SparseEncoder
from corrsteer.errors import CorrSteerError
from corrsteer.evidence import BINNED, Evidence
from corrsteer.generation import Decoding, complete, plan_batches, stop_tokens, tokenize
from corrsteer.models import HookPoint
from corrsteer.moments import Moments
from corrsteer.passes import check_positions
from corrsteer.pooling import RunningPool
from corrsteer.sae_files import Decoder, open_decoder
from corrsteer.stability import Leader, Snapshot
from corrsteer.tasks import Task

FEWEST_PERMUTATIONS = 19


@dataclass
class Run:
    """What a collection leaves: moments, evidence, rewards, and how they came about.

    Attributes
    ----------
    moments : layer -> pooling -> `Moments`.
    evidence : layer -> pooling -> `Evidence`, with permutations and bootstrap for `pool` alone.
    snapshots : which features were in front after how many samples, oldest first.
    points : layer -> hook point.
    decoders : layer -> where decoder rows are read from.
    rewards : `[n]` float64, in the task's order; NaN for samples that a stopped collection did not reach.
    pool, coefficient_pool : pooling for the correlation and for the coefficient.
    notes : what a user should know, such as a reward that never varied.
    provenance : model, task, SAEs, decoding and versions; anything JSON can hold.
    """

    moments: dict[int, dict[str, Moments]]
    points: dict[int, HookPoint]
    decoders: dict[int, Decoder]
    rewards: Tensor
    pool: str
    coefficient_pool: str
    evidence: dict[int, dict[str, Evidence]] = field(default_factory=dict)
    snapshots: list[Snapshot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    _tested: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def n_features(self) -> int:
        """Features of all layers."""
        return sum(moments[self.pool].d_sae for moments in self.moments.values())

    @property
    def n(self) -> int:
        """Samples collected."""
        return next(iter(self.moments.values()))[self.pool].n

    def correlation(self, layer: int) -> Tensor:
        """Pearson's r of every feature of a layer with the reward, `[d_sae]`."""
        return self.moments[layer][self.pool].correlation()[0]

    @property
    def permutations(self) -> int:
        """How many permutations its p-values come from; 0 if there are none."""
        return next((by_pool[self.pool].permutations for by_pool in self.evidence.values()), 0)

    def testable(self, score: str = "pearson") -> bool:
        """Whether a score's permutations were kept."""
        kept = [by_pool[self.pool] for by_pool in self.evidence.values()]
        return bool(kept) and self.n > 0 and all(scores_.testable(evidence, score) for evidence in kept)

    def significance(self, score: str = "pearson") -> dict[int, inference.Significance]:
        """P-values of every layer's features by layer, see `inference.significance`; computed once for a score."""
        if (score, self.n) not in self._tested:
            kept = {layer: by_pool[self.pool] for layer, by_pool in self.evidence.items()}
            if not kept:
                raise CorrSteerError("this run holds no evidence to test features by; collect again")
            self._tested[score, self.n] = inference.significance(kept, score)
        return self._tested[score, self.n]

    def save(self, directory) -> None:
        """Write the run to a directory: `run.json`, the rewards and each layer's moments and evidence.

        Evidence is the largest part, 8 bytes a feature and permutation.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "run.json").unlink(missing_ok=True)  # written last, so that half a run is none
        for stale in directory.glob("layer_*.safetensors"):
            stale.unlink()
        for layer, moments in self.moments.items():
            for pool, state in moments.items():
                state.save(directory / f"layer_{layer}.{pool}.safetensors")
        for layer, evidences in self.evidence.items():
            for pool, evidence in evidences.items():
                evidence.save(directory / f"layer_{layer}.{pool}.evidence.safetensors")
        save_file({"rewards": self.rewards}, str(directory / "rewards.safetensors"))
        described = {
            "layers": {
                str(layer): {
                    "point": str(point),
                    "decoder": self.decoders[layer].source,
                    "pools": list(self.moments[layer]),
                }
                for layer, point in self.points.items()
            },
            "pool": self.pool,
            "coefficient_pool": self.coefficient_pool,
            "evidence": {str(layer): list(evidences) for layer, evidences in self.evidence.items()},
            "snapshots": [asdict(snapshot) for snapshot in self.snapshots],
            "notes": self.notes,
            "provenance": self.provenance,
        }
        (directory / "run.json").write_text(json.dumps(described, indent=2))

    @classmethod
    def load(cls, directory) -> Run:
        """Read what `save` wrote. Decoder rows are found again by where each SAE came from."""
        directory = Path(directory)
        try:
            described = json.loads((directory / "run.json").read_text())
            layers = {int(layer): entry for layer, entry in described["layers"].items()}
            return cls(
                moments={
                    layer: {
                        pool: Moments.load(directory / f"layer_{layer}.{pool}.safetensors") for pool in entry["pools"]
                    }
                    for layer, entry in layers.items()
                },
                points={layer: HookPoint.parse(entry["point"]) for layer, entry in layers.items()},
                decoders={layer: open_decoder(entry["decoder"]) for layer, entry in layers.items()},
                rewards=load_file(str(directory / "rewards.safetensors"))["rewards"],
                evidence={
                    int(layer): {
                        pool: Evidence.load(directory / f"layer_{layer}.{pool}.evidence.safetensors") for pool in kept
                    }
                    for layer, kept in described.get("evidence", {}).items()
                },
                snapshots=[_snapshot(entry) for entry in described.get("snapshots", [])],
                **{key: described[key] for key in ("pool", "coefficient_pool", "notes", "provenance")},
            )
        except CorrSteerError:
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorrSteerError(f"{directory} is not a saved run: it has no {Path(error.filename).name}") from None
        except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorrSteerError(f"the run in {directory} is damaged ({error}); collect again") from None


def _snapshot(entry: dict) -> Snapshot:
    leaders = {int(layer): tuple(Leader(**one) for one in rows) for layer, rows in entry["leaders"].items()}
    return Snapshot(entry["n"], leaders)


class CollectionStopped(CorrSteerError):
    """Collection could not go on; `run` holds everything up to there."""

    def __init__(self, message: str, run: Run):
        super().__init__(f"{message} (the {run.n} samples collected before are kept)" if run.n else message)
        self.run = run


def collect(
    model: nn.Module,
    tokenizer,
    encoders: Mapping[int, SparseEncoder],
    task: Task,
    *,
    pool: str = "max",
    coefficient_pool: str | None = None,
    positions: str = "generated",
    decoding: Decoding | None = None,
    hook_offset: int = 0,
    permutations: int = 1000,
    bootstrap: int = 0,
    scores: Sequence[str] = ("pearson",),
    block_size: int = 512,
    shuffle_seed: int = 0,
    patience: int | None = None,
    buffer_bytes: int = 1 << 30,
    statistics_bytes: int = 16 << 30,
    progress: bool = True,
    backend: str | None = None,
) -> Run:
    """Generate a completion for every example, grade it, and stream activations and rewards into statistics.

    Examples are taken in random order, in blocks. Within a block they are batched by length, and labels permuted.

    Parameters
    ----------
    model, tokenizer : a Hugging Face causal language model and its tokenizer.
    encoders : layer -> encoder. An encoder that does not say where it was trained reads the layer's output. Each is
        moved to its layer's device.
    task : prompts and their grader.
    pool : `max` or `mean` over a sample's kept steps, for the correlation.
    coefficient_pool : the same for the coefficient; by default `pool`.
    positions : `generated`, the kept steps of the generation, or `all`, the prompt as well.
    decoding : how to generate.
    hook_offset : layers to add to every hook point. -1 reads each SAE one block early, as the paper's released code
        does; nothing else needs it.
    permutations : P, of the labels, for p-values, none of which is below 1 / (P + 1); 0, or at least 19. They take
        8 · P bytes a feature.
    bootstrap : replicates for bootstrap intervals, which take 24 bytes each a feature. Other intervals need none.
    scores : which scores to keep permutations of, and what that takes, see `Evidence`.
    block_size : examples in a block, whose pooled activations are kept until the last of them is graded: 4 bytes a
        feature and example. No batch is larger; and as batches go by it, so do sampled completions.
    shuffle_seed : of the examples' order, the permutations and the bootstrap.
    patience : stop early when for so many blocks no layer's best feature has changed, and their intervals lie above
        those of the next ones. P-values are of the samples collected, as if that many had been planned.
    buffer_bytes : memory for captured residuals. Past it they are encoded and pooled as they come; the result is
        the same.
    statistics_bytes : the most memory that evidence and a block's pooled activations may take, for all layers.
    backend : a backend's name; by default the fastest that can.

    Raises
    ------
    CorrSteerError : before anything is generated, where task, encoders and model do not fit together, or the
        statistics would not fit in `statistics_bytes`.
    CollectionStopped : for whatever goes wrong later, such as activations that are NaN or infinite, a grader that
        fails, or an interrupt from the keyboard; the batches collected before are in its `run`.
    """
    decoding = decoding or Decoding()
    check_positions(positions, KEPT_POSITIONS)
    pools = tuple(dict.fromkeys((pool, coefficient_pool or pool)))
    for name in pools:
        if name not in ("mean", "max"):
            raise CorrSteerError(f"pool must be mean or max, got {name!r}")
    for name, value, least in (
        ("block_size", block_size, 1),
        ("patience", patience, 1),
        ("shuffle_seed", shuffle_seed, 0),
    ):
        if value is not None and (not isinstance(value, int) or value < least):
            raise CorrSteerError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if 0 < permutations < FEWEST_PERMUTATIONS:
        raise CorrSteerError(
            f"permutations must be 0 or at least {FEWEST_PERMUTATIONS}, as with fewer no p-value can be as small as "
            f"0.05, got {permutations}"
        )
    if permutations and block_size == 1:
        raise CorrSteerError("block_size must be at least 2 for permutations, which are made within blocks, got 1")
    points = place(model, encoders, hook_offset)
    prompts = tokenize(model, tokenizer, task, decoding)
    devices = {layer: models.device_of(model, point) for layer, point in points.items()}
    encoders = {layer: encoder.to(devices[layer]) for layer, encoder in encoders.items()}
    calls = [
        backends.Call("encode_pool", devices[layer], model.dtype, encoder.activation, encoder.precision)
        for layer, encoder in encoders.items()
    ]
    chosen = sorted({backends.choose(call, backend).name for call in calls})
    tested = {"permutations": permutations, "bootstrap": bootstrap, "scores": scores}

    def evidence_of(layer: int, name: str, device) -> Evidence:
        return Evidence(encoders[layer].d_sae, seed=shuffle_seed, device=device, **(tested if name == pool else {}))

    for layer, encoder in encoders.items():
        if evidence_of(layer, pool, "meta").histograms and encoder.activation in SIGNED:
            raise CorrSteerError(
                f"scores must not be {', '.join(BINNED)} for encoders[{layer}], whose activation {encoder.activation} "
                f"can be negative; leave them out, got {', '.join(scores)}"
            )
    evidence = _allocated(encoders, pools, evidence_of, devices, min(block_size, len(task)), statistics_bytes)
    run = Run(
        moments={
            layer: {name: Moments(encoder.d_sae, device=devices[layer]) for name in pools}
            for layer, encoder in encoders.items()
        },
        points=points,
        decoders={layer: encoder.decoder for layer, encoder in encoders.items()},
        rewards=torch.full((len(task),), torch.nan, dtype=torch.float64),
        pool=pool,
        coefficient_pool=coefficient_pool or pool,
        evidence=evidence,
        provenance=_provenance(model, task, encoders, positions, decoding, hook_offset)
        | {"backends": chosen, "block_size": block_size, "shuffle_seed": shuffle_seed},
    )
    order = list(range(len(task)))
    random.Random(shuffle_seed).shuffle(order)
    blocks = [order[at : at + block_size] for at in range(0, len(order), block_size)]
    # The longest prompt first, so that what is too large for the memory fails at once; a block keeps its number.
    first = max(range(len(blocks)), key=lambda k: max(len(prompts[i]) for i in blocks[k]))
    numbers = [first, *(k for k in range(len(blocks)) if k != first)]
    selectable = [layer for layer in encoders if layer != 0] or list(encoders)  # as `select` leaves layer 0 out
    collector = _Collector(
        run, model, tokenizer, encoders, task, prompts, pools, positions, decoding, buffer_bytes, backend
    )
    with tqdm(total=len(task), unit="sample", desc=f"collect {task.name}", disable=not progress) as bar:
        try:
            for at, number in enumerate(numbers, 1):
                collector.collect(number, blocks[number], bar.update)
                if progress:
                    bar.set_postfix_str(_leader(run), refresh=False)
                if patience and at < len(blocks) and stability.stable(run.snapshots, patience, selectable):
                    run.notes.append(
                        f"stopped after {run.n} of {len(task)} samples, as for {patience} blocks no layer's best "
                        f"feature has changed, and its interval now lies above the next one's"
                    )
                    break
        except (Exception, KeyboardInterrupt) as error:  # a GPU out of memory, say: hours of work are in the run
            if isinstance(error, CorrSteerError):
                reason = str(error)
            else:
                reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
            _note_constant_reward(run)
            raise CollectionStopped(reason, run) from error
    _note_constant_reward(run)
    return run


def _allocated(encoders, pools, evidence_of, devices, block: int, most: int) -> dict[int, dict[str, Evidence]]:
    """Evidence of every layer and pooling; refused before anything is generated where it would not fit."""
    kept = sum(evidence_of(layer, name, "meta").nbytes for layer in encoders for name in pools)
    held = sum(4 * block * encoder.d_sae * len(pools) for encoder in encoders.values())
    remedy = (
        f"evidence takes {kept / 2**30:.3g} GiB (8 bytes a feature, permutation and score, three times that a "
        f"bootstrap replicate, and for scores of histograms as often as there are bins), a block of {block} samples "
        f"{held / 2**30:.3g} GiB; take fewer permutations, replicates or scores, or a smaller block_size"
    )
    if kept + held > most:
        raise CorrSteerError(f"statistics_bytes must be at least {kept + held}, got {most}: {remedy}")
    try:
        return {layer: {name: evidence_of(layer, name, devices[layer]) for name in pools} for layer in encoders}
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one of the former
        raise CorrSteerError(f"there is no memory for the statistics ({type(error).__name__}): {remedy}") from error


def place(model: nn.Module, encoders: Mapping[int, SparseEncoder], hook_offset: int = 0) -> dict[int, HookPoint]:
    """The hook point of every encoder, after checking that each fits the model there."""
    if not encoders:
        raise CorrSteerError("encoders must map at least one layer to a SparseEncoder, got none")
    points = {}
    for layer, encoder in encoders.items():
        point = HookPoint(layer) if encoder.hook_name is None else HookPoint.parse(encoder.hook_name, model)
        if point.layer != layer:
            raise CorrSteerError(
                f"encoders[{layer}] was trained at {encoder.hook_name}, which is layer {point.layer}; "
                f"give it under that layer"
            )
        points[layer] = point.offset(hook_offset)
        models.check_point(model, points[layer])
        if encoder.d_in != models.width(model):
            raise CorrSteerError(
                f"encoders[{layer}] has d_in={encoder.d_in}, but the model's residual stream is {models.width(model)} "
                f"wide; use an SAE of this model"
            )
        if "transcoder" in encoder.metadata.get("architecture", ""):
            raise CorrSteerError(
                f"encoders[{layer}] is a transcoder, whose decoder writes elsewhere than its encoder reads; "
                f"its features can be encoded and pooled, but not collected for steering"
            )
    return points


@contextlib.contextmanager
def _uninterrupted():
    """Have an interrupt from the keyboard wait until the end."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():  # it is not Python's to change
        yield
        return
    waiting = []
    signal.signal(signal.SIGINT, lambda *_: waiting.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        signal.raise_signal(signal.SIGINT)


@dataclass
class _Collector:
    """What every block of one collection needs."""

    run: Run
    model: nn.Module
    tokenizer: Any
    encoders: dict[int, SparseEncoder]
    task: Task
    prompts: list[list[int]]
    pools: tuple[str, ...]
    positions: str
    decoding: Decoding
    buffer_bytes: int
    backend: str | None
    batches: int = 0  # so far

    def collect(self, number: int, block: list[int], done) -> None:
        """Generate and grade a block's examples, then fold them into the run; `done` is told how many, batch by batch.

        What goes wrong in a batch leaves the run with those before it.
        """
        pooled = {
            layer: {pool: torch.empty(len(block), e.d_sae, device=self._device(layer)) for pool in self.pools}
            for layer, e in self.encoders.items()
        }
        rewards = torch.full((len(block),), torch.nan, dtype=torch.float64)
        try:
            for rows in plan_batches([len(self.prompts[i]) for i in block], self.decoding):
                self._batch([block[row] for row in rows], rows, pooled, rewards)
                done(len(rows))
        except BaseException:
            # Should folding fail as well, that has been noted, and the first reason is the one to give.
            with contextlib.suppress(Exception):
                self._fold(number, block, pooled, rewards)
            raise
        self._fold(number, block, pooled, rewards)

    def _batch(self, batch: list[int], rows: list[int], pooled: dict[int, dict[str, Tensor]], rewards: Tensor) -> None:
        """Generate, grade, encode and pool some examples, into these rows of a block's activations and rewards."""
        examples = [self.task.examples[i] for i in batch]
        running: dict[int, RunningPool] = {}

        def take(layer: int, x: Tensor, cu_seqlens: Tensor) -> None:
            if layer not in running:
                running[layer] = RunningPool(self.encoders[layer], len(batch), self.backend)
            running[layer].add(*self._checked(layer, x, cu_seqlens, examples))

        with Capture(
            self.model,
            self.run.points,
            stop_tokens=stop_tokens(self.model, self.tokenizer),
            positions=self.positions,
            max_new_tokens=self.decoding.max_new_tokens,
            budget_bytes=self.buffer_bytes,
            sink=take,
        ) as capture:
            prompts = [self.prompts[i] for i in batch]
            criteria = [capture.stopping_criterion]
            completions = complete(self.model, self.tokenizer, prompts, self.decoding, self.batches, criteria)
        self.batches += 1
        grades = [self.task.grade(completion, example) for completion, example in zip(completions, examples)]
        for layer, encoder in self.encoders.items():
            x, cu_seqlens = self._checked(layer, *capture.packed(layer), examples)
            if capture.flushed:
                running[layer].add(x, cu_seqlens)
                found = {pool: running[layer].result(pool) for pool in self.pools}
            elif len(self.pools) == 1:
                (pool,) = self.pools
                found = {pool: ops.encode_pool(x, cu_seqlens, encoder, pool, backend=self.backend)}
            else:
                both = ops.encode_pool(x, cu_seqlens, encoder, "both", backend=self.backend)
                found = dict(zip(("mean", "max"), both))
            for pool, values in found.items():
                pooled[layer][pool][rows] = values
        rewards[rows] = torch.tensor(grades, dtype=torch.float64)

    def _fold(self, number: int, block: list[int], pooled: dict[int, dict[str, Tensor]], rewards: Tensor) -> None:
        """Fold what there is of a block into the run: all of it, or nothing."""
        there = rewards.isfinite().nonzero()[:, 0]
        if len(there) == 0:
            return
        whole = len(there) == len(block)
        fresh = {
            layer: {pool: Moments(state.d_sae, device=state.device) for pool, state in states.items()}
            for layer, states in self.run.moments.items()
        }
        known = self.run.rewards.clone()
        known[[block[i] for i in there.tolist()]] = rewards[there]
        with _uninterrupted():
            for layer, pools in pooled.items():
                for pool, rows in pools.items():
                    pools[pool] = rows if whole else rows[there.to(rows.device)]
                    y = rewards[there].to(rows.device)
                    fresh[layer][pool].update(pools[pool], y, backend=self.backend)
                    fresh[layer][pool].merge(self.run.moments[layer][pool])
            try:
                for layer, pools in pooled.items():
                    for pool, rows in pools.items():
                        self.run.evidence[layer][pool].update(rows, rewards[there], number, backend=self.backend)
            except Exception:
                # Part of the layers have the block now, and a copy of everything is too much to keep for this.
                self.run.evidence = {}
                self.run.notes.append("a block could not be added to the evidence, so there are no intervals or tests")
                raise
            finally:
                self.run.moments, self.run.rewards = fresh, known
            kept = {layer: evidences[self.run.pool] for layer, evidences in self.run.evidence.items()}
            if kept:
                self.run.snapshots.append(stability.snapshot(kept))

    def _device(self, layer: int) -> torch.device:
        return self.run.moments[layer][self.run.pool].device

    def _checked(self, layer: int, x: Tensor, cu_seqlens: Tensor, examples) -> tuple[Tensor, Tensor]:
        """The captured tokens on the device of the layer's moments, after a look for NaN."""
        device = self._device(layer)
        x, cu_seqlens = x.to(device), cu_seqlens.to(device)
        _check_finite(x, cu_seqlens, self.run.points[layer], examples)
        return x, cu_seqlens


def _check_finite(x: Tensor, cu_seqlens: Tensor, point: HookPoint, examples) -> None:
    finite = torch.isfinite(x).all(dim=1)
    if bool(finite.all()):
        return
    at = int((~finite).nonzero()[0])
    sample = int(torch.searchsorted(cu_seqlens, at, right=True)) - 1
    raise CorrSteerError(
        f"the model's activations at {point} are NaN or infinite for {examples[sample].source}; "
        f"load the model in bfloat16 or float32, or take the example out"
    )


def _leader(run: Run) -> str:
    best = max((float(r), layer, int(i)) for layer in run.moments for r, i in [run.correlation(layer).max(0)])
    mean = run.rewards.nanmean().item()
    return f"reward {mean:.3f}, top L{best[1]}/{best[2]} r={best[0]:.3f}"


def _note_constant_reward(run: Run) -> None:
    moments = next(iter(run.moments.values()))[run.pool]
    if run.n and not bool(moments.label_varies().any()):
        run.notes.append(
            f"every one of the {run.n} rewards was {run.rewards.nanmean().item():g}, so nothing correlates with them "
            f"and no feature can be selected; use a task that the model solves sometimes"
        )


def _provenance(model, task, encoders, positions, decoding, hook_offset) -> dict[str, Any]:
    import transformers

    return {
        "model": model.config._name_or_path,
        "model_dtype": str(model.dtype),
        "task": {"name": task.name, "grader": task.grader_name, "chat": task.chat, "examples": len(task)},
        "saes": {
            str(layer): {"encoder": encoder.describe(), "source": encoder.decoder.source, "metadata": encoder.metadata}
            for layer, encoder in encoders.items()
        },
        "positions": positions,
        "decoding": asdict(decoding),
        "hook_offset": hook_offset,
        "versions": {
            "corrsteer": corrsteer.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
