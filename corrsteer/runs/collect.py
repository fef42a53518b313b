"""`collect`: generate, grade, and fold the activations of every kept step into moments and evidence, one per layer."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from corrsteer import processes
from corrsteer.arguments import as_path, check_type, whole
from corrsteer.compatibility import warn_once
from corrsteer.errors import CorrSteerError
from corrsteer.lm import hook_points
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.identity import computed_on
from corrsteer.ops import Moments, registry
from corrsteer.rollouts.journal import Journal
from corrsteer.rollouts.rollout import Rollout
from corrsteer.runs import run_files
from corrsteer.runs.batches import BatchReader
from corrsteer.runs.begun import begun_as, saved_run
from corrsteer.runs.blocks import BlockCollector
from corrsteer.runs.excluded import excluded_tokens
from corrsteer.runs.journal import FOLDER, CollectionJournal
from corrsteer.runs.keeper import Keeper
from corrsteer.runs.options import Options
from corrsteer.runs.placement import place, place_directions
from corrsteer.runs.pooling import RESIDUAL_POOLINGS
from corrsteer.runs.provenance import provenance
from corrsteer.runs.run import BEGUN, Run
from corrsteer.runs.samples import generated, given
from corrsteer.runs.shared_batches import SharedBatches
from corrsteer.sae.encoder import SparseEncoder
from corrsteer.stats import stability
from corrsteer.stats.blocks import shuffled_blocks
from corrsteer.tasks import Task
from corrsteer.types import PathLike

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CollectionStopped(CorrSteerError):
    """Collection could not go on; `run` holds everything up to there. With a directory, the same call goes on."""

    def __init__(self, message: str, run: Run):
        super().__init__(message, run)  # both, as unpickling makes it anew from them
        self.message = message
        self.run = run

    def __str__(self) -> str:
        return f"{self.message} (the {self.run.n} samples collected before are kept)" if self.run.n else self.message


def collect(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoders: Mapping[int, SparseEncoder],
    task: Task | None = None,
    *,
    rollouts: Iterable[Rollout] | None = None,
    samples_per_prompt: int = 1,
    within_prompt: bool = False,
    pool: str = "max",
    coefficient_pool: str | None = None,
    positions: str = "generated",
    exclude_tokens: Collection[int] | None = None,
    decoding: Decoding | None = None,
    hook_offset: int = 0,
    permutations: int = 1000,
    bootstrap: int = 0,
    scores: Sequence[str] = ("pearson",),
    block_size: int = 512,
    shuffle_seed: int = 0,
    patience: int | None = None,
    patience_layers: Collection[int] | None = None,
    buffer_bytes: int = 1 << 30,
    statistics_bytes: int = 16 << 30,
    keep_activations: str = "auto",
    activation_bytes: int = 4 << 30,
    directory: PathLike | None = None,
    anew: bool = False,
    finish: bool = False,
    record: Mapping[str, Any] | None = None,
    progress: bool = True,
    backend: str | None = None,
) -> Run:
    """Generate a completion for every example, grade it, and correlate activations with rewards.

    Or read completions that exist, with `rollouts`: no token is generated, and nothing above the last hooked layer is
    computed. Samples are taken in random order, in blocks. Within a block they are batched by length, and labels
    permuted. Of several completions of a prompt, and of prompts that repeat, whole prompts are permuted.

    Parameters
    ----------
    model, tokenizer : a Hugging Face causal language model and its tokenizer.
    encoders : layer -> encoder. An encoder that does not say where it was trained reads the layer's output. Each is
        moved to its layer's device.
    task : prompts and their graders. With rollouts, by default their prompts and the rewards that they hold; another
        is one that `task_of(rollouts, grader)` gives, whose graders grade them anew.
    rollouts : completions to read, one for each of the task's examples in their order, see `read_rollouts`. Each has an
        id of its own, and all have the same rewards.
    samples_per_prompt : completions of each prompt, which need a temperature.
    within_prompt : centre activations and rewards within each prompt, and permute within it: what is left is what tells
        good from bad completions of the same prompt.
    pool : `max` or `mean` over a sample's kept steps, for the correlation; or `last_prompt`, the activation at the last
        prompt token alone, which is kept beside the others in any case.
    coefficient_pool : the same for the coefficient; by default `pool`.
    positions : `generated`, the kept steps of the generation, or `all`, the prompt as well.
    exclude_tokens : ids of prompt tokens that `all` leaves out; by default the BOS token and those that the encoders'
        metadata says they were trained without, see `excluded_tokens`. `()` keeps them. A prompt's last token is kept.
    decoding : how to generate.
    hook_offset : layers to add to every hook point. -1 reads each SAE one block early, as the paper's released code
        does; nothing else needs it.
    permutations : P, of the labels, for p-values, none of which is below 1 / (P + 1); 0, or at least 19. They take
        8 · P bytes a feature.
    bootstrap : replicates for bootstrap intervals, which take 24 bytes each a feature. Other intervals need none.
    scores : which scores to keep permutations of, and what that takes, see `Evidence`.
    block_size : examples in a block, whose pooled activations are kept until the last of them is graded: 4 bytes a
        feature, pooling and example. No batch is larger.
    shuffle_seed : of the examples' order, the permutations and the bootstrap.
    patience : stop early when for so many blocks no layer's best feature has changed, and their intervals lie above
        those of the next ones. P-values are of the samples collected, as if that many had been planned.
    patience_layers : the layers that `patience` looks at; by default all.
        `corrsteer.experiments.selection.selectable` gives those that `select` considers.
    buffer_bytes : memory for captured residuals. Past it they are encoded and pooled as they come; the result is
        the same.
    statistics_bytes : the most memory that evidence and a block's pooled activations and residuals may take, for all
        layers.
    keep_activations : whether every sample's pooled activations are kept, of which permutations, other scores, other
        rewards and parts of the samples can be had at any time, see `Run.statistics`. `auto`, while they take at most
        `activation_bytes`, and not of encoders whose features are all active (`identity`); past it they become evidence
        that is streamed, which a note says. `always`; or `never`.
    activation_bytes : see there. They lie on disk where `directory` is given, otherwise in memory.
    directory : where the run is saved, and until then all that there is of it, batch by batch, in a folder
        `collecting`. The same call goes on with what is there, and comes to the same result as if it had never been
        stopped; another call is refused, and so is one while another process is at it. A run that is there already is
        given back. Processes that `torchrun` launches share the batches among them.
    anew : throw away what was begun or finished in the directory.
    finish : make a run of what is there, and collect nothing more.
    record : anything else that the run's provenance should hold.
    backend : a backend's name; by default the fastest that can.

    Raises
    ------
    CorrSteerError : before anything is generated, where task, encoders and model do not fit together, or the
        statistics would not fit in `statistics_bytes`.
    JobDiffers : where another collection was begun or finished in the directory; the message lists each difference.
    CollectionStopped : for whatever goes wrong later, such as activations that are NaN or infinite, a grader that
        fails, or an interrupt from the keyboard; the batches collected before are in its `run`.
    """
    warn_once()
    decoding = decoding or Decoding()
    check_type("encoders", encoders, Mapping, "a mapping of layers to encoders, such as {20: encoder}")
    encoders = {whole("each layer of encoders", layer, 0): encoder for layer, encoder in encoders.items()}
    if positions != "all":
        if exclude_tokens:
            raise CorrSteerError(
                f"exclude_tokens must be left out unless positions is 'all', as they are of prompts, got positions "
                f"{positions!r}"
            )
        exclude_tokens = ()
    elif exclude_tokens is None:
        exclude_tokens = excluded_tokens(tokenizer, encoders.values())
    options = Options(
        pool=pool, coefficient_pool=pool if coefficient_pool is None else coefficient_pool, positions=positions,
        permutations=permutations, bootstrap=bootstrap, scores=scores, block_size=block_size,
        shuffle_seed=shuffle_seed, patience=patience, patience_layers=patience_layers, buffer_bytes=buffer_bytes,
        statistics_bytes=statistics_bytes, backend=backend, exclude_tokens=exclude_tokens,
        keep_activations=keep_activations, activation_bytes=activation_bytes, within_prompt=within_prompt,
    )  # fmt: skip
    hook_offset = whole("hook_offset", hook_offset)
    hook_points.check_generates(model)
    points = place(model, encoders, hook_offset)
    steered = place_directions(model, encoders, points, hook_offset)
    if rollouts is None:
        samples = generated(model, tokenizer, task, decoding, samples_per_prompt, points, options)
    elif samples_per_prompt != 1:
        raise CorrSteerError(
            f"samples_per_prompt must be left out with rollouts, which are as many as they are, got "
            f"{samples_per_prompt}"
        )
    else:
        samples = given(model, tokenizer, rollouts, task, decoding, points, options)
    if samples.groups and options.patience:
        raise CorrSteerError(
            f"patience must be left out where prompts have several samples, as the intervals that it waits for take "
            f"samples to be independent, got {options.patience}"
        )
    devices = {layer: hook_points.device_of(model, point) for layer, point in points.items()}
    encoders = {layer: encoder.to(devices[layer]) for layer, encoder in encoders.items()}
    dtype: Any = model.dtype
    calls = [
        registry.Call("encode_pool", devices[layer], dtype, encoder.activation, encoder.precision)
        for layer, encoder in encoders.items()
    ]
    backends = sorted({registry.choose(call, backend).name for call in calls})
    options.check_encoders(encoders)
    blocks = shuffled_blocks(samples.lengths, options.block_size, options.shuffle_seed, groups=samples.groups or None)
    run = Run(
        moments={
            layer: {name: Moments(encoder.d_sae, device=devices[layer]) for name in options.pools}
            for layer, encoder in encoders.items()
        },
        residuals={
            layer: {name: Moments(encoder.d_in, device=devices[layer]) for name in RESIDUAL_POOLINGS}
            for layer, encoder in encoders.items()
        },
        points=points,
        steered=steered,
        decoders={layer: encoder.decoder for layer, encoder in encoders.items()},
        rewards=torch.full((len(samples),), torch.nan, dtype=torch.float64, device="cpu"),
        pool=options.pool,
        coefficient_pool=options.coefficient_pool,
        groups=samples.groups,
        notes=samples.notes,
        provenance=provenance(model, samples.task, encoders, positions, decoding, hook_offset)
        | samples.provenance
        | {"exclude_tokens": list(options.exclude_tokens), "backends": backends}
        | {name: getattr(options, name) for name in ("block_size", "shuffle_seed", "within_prompt")}
        | dict(record or {}),
    )
    reader = BatchReader(samples, encoders, points, devices, options)
    plans = {number: samples.source.plan(block) for number, block in blocks.items()}
    if directory is None:
        _check_alone(anew, finish)
        _collect(run, SharedBatches(reader, blocks, plans, None), progress=progress)
        return run
    directory, begun = as_path("directory", directory), begun_as(model, reader, decoding, hook_offset)
    made_with = computed_on(model) | {"backends": ", ".join(backends), "graders of source": samples.task.grading.source}
    with Journal(directory / FOLDER, begun, made_with=made_with, anew=anew) as journal:
        done = None if anew else saved_run(directory, journal.begun, journal.resumed)
        if done is not None:
            journal.leave()
            return done
        if finish and processes.among_others():
            raise CorrSteerError("finish must be False where several processes collect, got True; finish in one")
        if finish and not journal.resumed:
            raise CorrSteerError(f"finish must be False unless some samples are in {directory}, got True; collect some")
        run.notes += journal.notes
        batches = SharedBatches(reader, blocks, plans, CollectionJournal(journal, devices))
        if processes.among_others() and not batches.help():
            return Run.load(directory)
        run_files.remove_parts(directory)
        _collect(run, batches, progress=progress, finish=finish)
        if finish and run.n < len(samples):
            run.notes.append(f"finished after {run.n} of {len(samples)} samples, as was asked for")
        run.provenance[BEGUN] = journal.begun
        try:
            run.save(directory)
        except CorrSteerError as error:
            raise CollectionStopped(str(error), run) from error
        journal.finish()
        return run


def _check_alone(anew: bool, finish: bool) -> None:
    """Raise where what needs a directory is asked for without one."""
    if anew or finish:
        raise CorrSteerError(f"{'anew' if anew else 'finish'} must be False without a directory, got True")
    if processes.among_others():
        raise CorrSteerError(
            "directory must be given to collect with several processes, which share it, got None; give one that all see"
        )


def _collect(run: Run, batches: SharedBatches, *, progress: bool, finish: bool = False) -> None:
    """Put the blocks together, and fold them into the run.

    Raises
    ------
    CollectionStopped : where that cannot go on.
    """
    reader, journal = batches.reader, batches.journal
    samples, options = reader.samples, reader.options
    largest = max(map(len, batches.blocks.values()))
    streams = journal is not None and journal.has_state
    with tqdm(total=len(samples), unit="sample", desc=f"collect {samples.task.name}", disable=not progress) as bar:
        keeper = Keeper(run, reader.encoders, reader.devices, options, largest, streams)
        folded = [] if journal is None else journal.load_state(run)
        collector = BlockCollector(run, samples, reader.encoders, keeper, options, journal, folded)
        read = batches.there if finish else batches.get
        try:
            for number, block in batches.blocks.items():
                collector.collect(
                    number, list(block), batches.plans[number], functools.partial(read, number), bar.update
                )
                if progress:
                    bar.set_postfix_str(_leader(run), refresh=False)
                if _stops_early(run, options, len(samples)):
                    break
        except (Exception, KeyboardInterrupt) as error:  # a GPU out of memory, say: hours of work are in the run
            reason = str(error) if isinstance(error, CorrSteerError) else f"{type(error).__name__}: {error}"
            if isinstance(error, KeyboardInterrupt):
                reason = str(error) or "interrupted"
            _finish(run, samples.task, keeper)
            raise CollectionStopped(reason, run) from error
    _finish(run, samples.task, keeper)


def _stops_early(run: Run, options: Options, samples: int) -> bool:
    """Whether `patience` ends the collection here, which the run then notes."""
    layers = run.points if options.patience_layers is None else options.patience_layers
    if not options.patience or run.n == samples or not stability.stable(run.snapshots, options.patience, layers):
        return False
    run.notes.append(
        f"stopped after {run.n} of {samples} samples, as for {options.patience} blocks no layer's best "
        f"feature has changed, and its interval now lies above the next one's"
    )
    return True


def _leader(run: Run) -> str:
    best = max((float(r), layer, int(i)) for layer in run.moments for r, i in [run.correlation(layer).max(0)])
    mean = run.rewards.nanmean().item()
    return f"reward {mean:.3f}, top L{best[1]}/{best[2]} r={best[0]:.3f}"


def _finish(run: Run, task: Task, keeper: Keeper) -> None:
    """Record which samples were seen, have evidence of them, and note what limits it."""
    run.provenance["samples"] = task.samples(run.rewards.isfinite().nonzero()[:, 0].tolist())
    keeper.finish()
    run.notes += run.statistics_notes()
