"""`collect`: generate, grade, and fold the activations of every kept step into moments, one per layer."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

import corrsteer
from corrsteer import backends, models, ops
from corrsteer.capture import KEPT_POSITIONS, Capture
from corrsteer.encoder import SparseEncoder
from corrsteer.errors import CorrSteerError
from corrsteer.generation import Decoding, complete, plan_batches, stop_tokens, tokenize
from corrsteer.models import HookPoint
from corrsteer.moments import Moments
from corrsteer.passes import check_positions
from corrsteer.pooling import RunningPool
from corrsteer.sae_files import Decoder, open_decoder
from corrsteer.tasks import Task

PROGRESS_SECONDS = 1.0  # how often the progress bar looks for the top feature


@dataclass
class Run:
    """What a collection leaves: moments, rewards, and how they came about.

    Attributes
    ----------
    moments : layer -> pooling -> `Moments`.
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
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Samples collected."""
        return next(iter(self.moments.values()))[self.pool].n

    def correlation(self, layer: int) -> Tensor:
        """Pearson's r of every feature of a layer with the reward, `[d_sae]`."""
        return self.moments[layer][self.pool].correlation()[0]

    def save(self, directory) -> None:
        """Write the run to a directory: `run.json`, the rewards and each layer's moments."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob("layer_*.safetensors"):
            stale.unlink()
        for layer, moments in self.moments.items():
            for pool, state in moments.items():
                state.save(directory / f"layer_{layer}.{pool}.safetensors")
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
                **{key: described[key] for key in ("pool", "coefficient_pool", "notes", "provenance")},
            )
        except CorrSteerError:
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorrSteerError(f"{directory} is not a saved run: it has no {Path(error.filename).name}") from None
        except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorrSteerError(f"the run in {directory} is damaged ({error}); collect again") from None


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
    buffer_bytes: int = 1 << 30,
    progress: bool = True,
    backend: str | None = None,
) -> Run:
    """Generate a completion for every example, grade it, and stream activations and rewards into moments.

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
    buffer_bytes : memory for captured residuals. Past it they are encoded and pooled as they come; the result is
        the same.
    backend : a backend's name; by default the fastest that can.

    Raises
    ------
    CorrSteerError : before anything is generated, where task, encoders and model do not fit together.
    CollectionStopped : for whatever goes wrong later, such as activations that are NaN or infinite, a grader that
        fails, or an interrupt from the keyboard; the batches collected before are in its `run`.
    """
    decoding = decoding or Decoding()
    check_positions(positions, KEPT_POSITIONS)
    pools = tuple(dict.fromkeys((pool, coefficient_pool or pool)))
    for name in pools:
        if name not in ("mean", "max"):
            raise CorrSteerError(f"pool must be mean or max, got {name!r}")
    points = place(model, encoders, hook_offset)
    prompts = tokenize(model, tokenizer, task, decoding)
    encoders = {layer: encoder.to(models.device_of(model, points[layer])) for layer, encoder in encoders.items()}
    calls = [
        backends.Call(
            "encode_update",
            models.device_of(model, point),
            model.dtype,
            encoders[layer].activation,
            encoders[layer].precision,
        )
        for layer, point in points.items()
    ]
    chosen = sorted({backends.choose(call, backend).name for call in calls})

    run = Run(
        moments={
            layer: {name: Moments(encoder.d_sae, device=models.device_of(model, points[layer])) for name in pools}
            for layer, encoder in encoders.items()
        },
        points=points,
        decoders={layer: encoder.decoder for layer, encoder in encoders.items()},
        rewards=torch.full((len(task),), torch.nan, dtype=torch.float64),
        pool=pool,
        coefficient_pool=coefficient_pool or pool,
        provenance=_provenance(model, task, encoders, positions, decoding, hook_offset) | {"backends": chosen},
    )
    batches = plan_batches([len(p) for p in prompts], decoding)
    collector = _Collector(
        run, model, tokenizer, encoders, task, prompts, pools, positions, decoding, buffer_bytes, backend
    )
    with tqdm(total=len(task), unit="sample", desc=f"collect {task.name}", disable=not progress) as bar:
        shown = 0.0
        try:
            for number, batch in enumerate(batches):
                collector.collect(number, batch)
                bar.update(len(batch))
                if progress and time.monotonic() - shown > PROGRESS_SECONDS:
                    shown = time.monotonic()
                    bar.set_postfix_str(_leader(run))
            if progress:
                bar.set_postfix_str(_leader(run))
        except (Exception, KeyboardInterrupt) as error:  # a GPU out of memory, say: hours of work are in the run
            if isinstance(error, CorrSteerError):
                reason = str(error)
            else:
                reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
            raise CollectionStopped(reason, run) from error
    _note_constant_reward(run)
    return run


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


@dataclass(frozen=True)
class _Collector:
    """What every batch of one collection needs."""

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

    def collect(self, number: int, batch: list[int]) -> None:
        """Generate, grade and fold the examples of one batch into the run's moments."""
        examples = [self.task.examples[i] for i in batch]
        running: dict[int, RunningPool] = {}

        def fold(layer: int, x: Tensor, cu_seqlens: Tensor) -> None:
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
            sink=fold,
        ) as capture:
            prompts = [self.prompts[i] for i in batch]
            criteria = [capture.stopping_criterion]
            completions = complete(self.model, self.tokenizer, prompts, self.decoding, number, criteria)
        grades = [self.task.grade(completion, example) for completion, example in zip(completions, examples)]
        rewards = torch.tensor(grades, dtype=torch.float64)
        fresh = {
            layer: {pool: Moments(state.d_sae, device=state.device) for pool, state in states.items()}
            for layer, states in self.run.moments.items()
        }
        for layer, states in fresh.items():
            x, cu_seqlens = self._checked(layer, *capture.packed(layer), examples)
            y, encoder = rewards.to(x.device), self.encoders[layer]
            if capture.flushed:
                pooled = running.pop(layer)
                pooled.add(x, cu_seqlens)
                for pool, moments in states.items():
                    moments.update(pooled.result(pool), y, backend=self.backend)
            elif len(states) == 1:
                (pool,) = self.pools
                ops.encode_update(x, cu_seqlens, y, encoder, states[pool], pool, backend=self.backend)
            else:
                pair = (states["mean"], states["max"])
                ops.encode_update(x, cu_seqlens, y, encoder, pair, "both", backend=self.backend)

        # Only now does the run change, and at once: a batch that fails or is interrupted leaves it as it was.
        for layer, states in fresh.items():
            for pool, moments in states.items():
                moments.merge(self.run.moments[layer][pool])
        known = self.run.rewards.clone()
        known[batch] = rewards
        self.run.moments, self.run.rewards = fresh, known

    def _checked(self, layer: int, x: Tensor, cu_seqlens: Tensor, examples) -> tuple[Tensor, Tensor]:
        """The captured tokens on the device of the layer's moments, after a look for NaN."""
        device = self.run.moments[layer][self.run.pool].device
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
    if not bool(moments.label_varies().any()):
        run.notes.append(
            f"every one of the {run.n} rewards was {run.rewards[0].item():g}, so nothing correlates with them and no "
            f"feature can be selected; use a task that the model solves sometimes"
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
