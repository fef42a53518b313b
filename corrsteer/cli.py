"""The command line: demo, collect, select, calibrate, evaluate, generate, plan, doctor.

Results go to stdout, as text or with `--json` as one JSON object; everything said along the way goes to stderr.
A user's mistake ends with one line and exit status 1; `--traceback` shows where it was noticed.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from corrsteer import __version__
from corrsteer import settings as config_
from corrsteer.errors import CorrSteerError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Find the SAE features that correlate with a reward while a language model generates, and steer along them."
    "\n\nStart with `corrsteer demo`. The way through is collect, select, evaluate; "
    "`corrsteer doctor` says what runs here.",
)
_show_traceback = False

# Options that several commands share. None means: not given, so the YAML file or the default decides.
Config = Annotated[Path | None, typer.Option(help="YAML file of settings, named like the options; options win.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Model = Annotated[str | None, typer.Option(help="Hugging Face model: a name on the hub or a directory.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="auto (spread over the GPUs, else CPU), cpu, cuda, cuda:1, ...")]
TaskName = Annotated[str | None, typer.Option(help="JSONL file, or a dataset on the hub as NAME or NAME:CONFIG.")]
Grader = Annotated[
    str | None, typer.Option(help="exact, choice, number, contains, regex, regex:PATTERN or module:function.")
]
Split = Annotated[str | None, typer.Option(help="Split of a hub dataset.")]
PromptField = Annotated[str | None, typer.Option(help="Name of the prompt in each row.")]
AnswerField = Annotated[str | None, typer.Option(help="Name of the answer in each row.")]
Chat = Annotated[bool | None, typer.Option(help="Wrap prompts in the tokenizer's chat template.")]
System = Annotated[str | None, typer.Option(help="System message, with --chat.")]
Part = Annotated[
    str | None, typer.Option(help="all, or the train (80 %), validation (10 %) or test (10 %) part of the task.")
]
SplitSeed = Annotated[int | None, typer.Option(help="Seed of that division.")]
Limit = Annotated[int | None, typer.Option(help="Use only the first so many examples of the part.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Longest completion, in tokens.")]
Temperature = Annotated[float | None, typer.Option(help="0 decodes greedily.")]
TopP = Annotated[float | None, typer.Option(help="Nucleus to sample from.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampling.")]
BatchTokens = Annotated[int | None, typer.Option(help="Most tokens in a batch, padding and completions counted.")]
BatchSize = Annotated[int | None, typer.Option(help="Most prompts in a batch.")]
Scale = Annotated[float | None, typer.Option(help="Multiplies the steering coefficients.")]
SteerPositions = Annotated[str | None, typer.Option(help="generated, all or prompt: which tokens are steered.")]


def main() -> None:
    """Entry point."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _global(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say more on stderr.")] = False,
) -> None:
    global _show_traceback
    _show_traceback = traceback
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


def _command(function: Callable) -> Callable:
    """Register a command whose mistakes end in one line."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (CorrSteerError, OSError) as error:
            if _show_traceback:
                raise
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from None

    return app.command(name=function.__name__)(run)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _print(result: dict[str, Any], as_json: bool, text: str) -> None:
    typer.echo(json.dumps(result, indent=2) if as_json else text)


@_command
def demo(
    json: Json = False,
    seed: Annotated[int, typer.Option(help="Seed of the division into train, validation and test.")] = 0,
    shuffle_rewards: Annotated[
        bool, typer.Option("--shuffle-rewards", help="A negative control: rewards go to other sums.")
    ] = False,
) -> None:
    """Run the whole job on a small model that ships with corrsteer; no network, under a minute."""
    from corrsteer.demo.run import run_demo

    say = _say if json else typer.echo
    result = run_demo(seed, say=say, progress=sys.stderr.isatty(), shuffle_rewards=shuffle_rewards)
    if json:
        _print(result, True, "")


@_command
def collect(
    config: Config = None,
    model: Model = None,
    sae: Annotated[
        list[str] | None,
        typer.Option(
            help="LAYER=SOURCE, once for each layer. SOURCE is a directory written by SAELens, RELEASE:SAE_ID of a "
            "published SAE, or `identity` for the residual dimensions themselves."
        ),
    ] = None,
    task: TaskName = None,
    grader: Grader = None,
    out: Annotated[Path | None, typer.Option(help="Directory to write the run to.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is already there.")] = False,
    pool: Annotated[str | None, typer.Option(help="max or mean over a sample's tokens, for the correlation.")] = None,
    coefficient_pool: Annotated[
        str | None, typer.Option(help="The same for the coefficient; by default as pool.")
    ] = None,
    positions: Annotated[str | None, typer.Option(help="generated, or all to read the prompt as well.")] = None,
    hook_offset: Annotated[int | None, typer.Option(help="-1 reads one block early, as the paper's code does.")] = None,
    split: Split = None,
    prompt_field: PromptField = None,
    answer_field: AnswerField = None,
    chat: Chat = None,
    system: System = None,
    part: Part = None,
    split_seed: SplitSeed = None,
    limit: Limit = None,
    dtype: Dtype = None,
    device: Device = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    batch_tokens: BatchTokens = None,
    batch_size: BatchSize = None,
    permutations: Annotated[
        int | None, typer.Option(help="Of the rewards, for p-values; each takes 8 bytes a feature.")
    ] = None,
    bootstrap: Annotated[
        int | None, typer.Option(help="Replicates for bootstrap intervals; they take 24 bytes each a feature.")
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(
            help="A score to keep permutations of, besides the correlation; give it again for more. One of histograms "
            "(mutual_information, auroc, spearman) takes 32 times the memory."
        ),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Examples among which rewards are permuted; no batch is larger.")
    ] = None,
    shuffle_seed: Annotated[
        int | None, typer.Option(help="Seed of the examples' order, the permutations and the bootstrap.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop when for so many blocks more samples have changed no layer's best feature.")
    ] = None,
    statistics_bytes: Annotated[
        int | None, typer.Option(help="The most memory that statistics may take, in bytes.")
    ] = None,
    buffer_bytes: Annotated[int | None, typer.Option(help="Memory for captured residuals, in bytes.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="The encoders' weights: fp32, bf16x2, bf16 or fp16; by default as stored.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="A backend's name; by default the fastest that runs.")] = None,
    json: Json = False,
) -> None:
    """Generate and grade a task's completions, and correlate every SAE feature with the reward."""
    given = config_.read(config_.CollectSettings, config, _flags(locals()))
    from corrsteer.evidence import SCORES

    for name in given.score:
        if name not in SCORES:
            raise CorrSteerError(f"score must be among {', '.join(SCORES)}, got {name!r}")
    from corrsteer.collection import CollectionStopped
    from corrsteer.collection import collect as collect_
    from corrsteer.stability import settled_at

    _prepare(given.out, force)
    task_ = _task(given)
    model_, tokenizer = _model(given)
    encoders = _encoders(given.sae, model_)
    if given.precision:
        encoders = {layer: encoder.to(precision=given.precision) for layer, encoder in encoders.items()}
    try:
        run = collect_(
            model_, tokenizer, encoders, task_,
            pool=given.pool, coefficient_pool=given.coefficient_pool, positions=given.positions,
            decoding=_decoding(given), hook_offset=given.hook_offset,
            permutations=given.permutations, bootstrap=given.bootstrap,
            scores=tuple(dict.fromkeys(("pearson", *given.score))), block_size=given.block_size,
            shuffle_seed=given.shuffle_seed, patience=given.patience, statistics_bytes=given.statistics_bytes,
            buffer_bytes=given.buffer_bytes, backend=given.backend,
        )  # fmt: skip
    except CollectionStopped as stopped:
        if stopped.run.n == 0:
            raise
        _save_run(stopped.run, given)
        raise CorrSteerError(f"{stopped}, in {given.out}") from None
    _save_run(run, given)
    reward = run.rewards.nanmean().item()
    tops = {layer: run.correlation(layer).max(0) for layer in run.moments}
    p = {layer: float(tested.p_adjusted[tops[layer].indices]) for layer, tested in _significance(run).items()}
    settled = settled_at(run.snapshots)
    result = {
        "out": str(given.out),
        "samples": run.n,
        "reward": reward,
        "notes": run.notes,
        "layers": {
            str(layer): {
                "feature": int(top.indices),
                "r": float(top.values),
                "p_adjusted": p.get(layer),
                "settled_at": settled.get(layer),
            }
            for layer, top in tops.items()
        },
    }
    best = [
        f"  layer {layer}: top feature {int(top.indices)}, r = {float(top.values):+.3f}"
        + (f", adjusted p {p[layer]:.4f}" if layer in p else "")
        + (f", in front since {settled[layer]} samples" if len(run.snapshots) > 2 else "")
        for layer, top in tops.items()
    ]
    lines = [f"{run.n} samples, mean reward {reward:.3f}, written to {given.out}", *best, *_noted(run.notes)]
    _print(result, json, "\n".join(lines))


@_command
def select(
    run: Annotated[Path, typer.Argument(help="Directory that `corrsteer collect` wrote.")],
    out: Annotated[Path, typer.Option(help="Steering file to write.")] = Path("steering.safetensors"),
    strategy: Annotated[
        str,
        typer.Option(
            help="single (the best feature of all layers), all (the best of each layer), or pruned (those that alone "
            "beat the unsteered score on the validation part of the run's task)."
        ),
    ] = "all",
    score: Annotated[
        str,
        typer.Option(
            help="What to rank by: pearson, point_biserial, contrastive or squared_ratio, or, if collected with it, "
            "mutual_information, auroc or spearman."
        ),
    ] = "pearson",
    alpha: Annotated[
        float | None, typer.Option(help="Keep only features whose corrected p-value is at most this.")
    ] = None,
    correction: Annotated[
        str,
        typer.Option(
            help="maxT (any feature of all layers does as well by chance), layer (of its layer) or bh (share of false "
            "discoveries)."
        ),
    ] = "maxT",
    interval: Annotated[str, typer.Option(help="delta, bootstrap or fisher.")] = "delta",
    coefficient: Annotated[
        str, typer.Option(help="mean_positive, mean_positive_active or contrastive.")
    ] = "mean_positive",
    direction: Annotated[str, typer.Option(help="positive, negative or both: correlations to select.")] = "positive",
    layer: Annotated[list[int] | None, typer.Option(help="Only these layers; by default all but layer 0.")] = None,
    top_k: Annotated[int, typer.Option(help="Rows of each layer's table.")] = 5,
    config: Config = None,
    model: Model = None,
    task: TaskName = None,
    grader: Grader = None,
    part: Part = None,
    limit: Limit = None,
    dtype: Dtype = None,
    device: Device = None,
    positions: SteerPositions = None,
    scale: Scale = None,
    json: Json = False,
) -> None:
    """Choose features and coefficients from a collected run, and write a steering file."""
    from corrsteer.collection import Run
    from corrsteer.selection import select as select_
    from corrsteer.tables import feature_table

    flags = {
        "model": model, "task": task, "grader": grader, "part": part, "limit": limit, "dtype": dtype,
        "device": device, "positions": positions, "scale": scale,
    }  # fmt: skip
    _check_folder(out)
    loaded = Run.load(run)
    pruning: dict[str, Any] = {}
    if strategy == "pruned":
        given = config_.read(config_.EvaluateSettings, config, flags, _recorded(loaded.provenance, "validation"))
        validation = _task(given)
        model_, tokenizer = _model(given)
        pruning = {
            "model": model_, "tokenizer": tokenizer, "validation": validation, "decoding": _decoding(given),
            "positions": given.positions, "scale": given.scale,
        }  # fmt: skip
    elif config is not None or any(value is not None for value in flags.values()):
        named = [f"--{name}" for name, value in (flags | {"config": config}).items() if value is not None]
        raise CorrSteerError(f"{', '.join(named)} can only be used with --strategy pruned, which runs the model")
    steering = select_(
        loaded, strategy,
        score=score, alpha=alpha, correction=correction, interval=interval,
        coefficient=coefficient, direction=direction, layers=layer, top_k=top_k, **pruning,
    )  # fmt: skip
    if not steering.features:
        raise CorrSteerError("; ".join(steering.notes))
    steering.save(out)
    result = {
        "out": str(out),
        "features": [vars(f) for f in steering.features],
        "table": {str(at): [vars(f) for f in rows] for at, rows in steering.table.items()},
        "notes": steering.notes,
    }
    rows = [f for layer_rows in steering.table.values() for f in layer_rows]
    text = feature_table(rows, {"selected": steering.features}, every_coefficient=True)
    _print(
        result, json, "\n".join([text, f"{len(steering.features)} features written to {out}", *_noted(steering.notes)])
    )


@_command
def calibrate(
    steering: Annotated[Path, typer.Option(help="Steering file that `corrsteer select` wrote.")],
    out: Annotated[Path, typer.Option(help="Steering file to write, with the chosen scale in its coefficients.")],
    try_scale: Annotated[
        list[float] | None, typer.Option(help="A scale to try; give it again for more. By default 0.25 to 3.")
    ] = None,
    config: Config = None,
    model: Model = None,
    task: TaskName = None,
    grader: Grader = None,
    positions: SteerPositions = None,
    part: Part = None,
    limit: Limit = None,
    dtype: Dtype = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Choose how strongly to steer, by the score of the validation part of the task that was collected on."""
    from corrsteer.scaling import SCALES, calibrate_scale
    from corrsteer.steering import Steering
    from corrsteer.tables import table

    _check_folder(out)
    flags = _flags(locals(), "steering", "out")
    loaded = Steering.load(steering)
    given = config_.read(config_.EvaluateSettings, config, flags, _recorded(loaded.provenance, "validation"))
    validation = _task(given)
    model_, tokenizer = _model(given)
    loaded.check(model_)
    scaled = calibrate_scale(
        model_, tokenizer, loaded, validation,
        scales=try_scale or SCALES, positions=given.positions, decoding=_decoding(given),
    )  # fmt: skip
    scaled.save(out)
    found = scaled.provenance["calibration"]
    text = table(
        ("scale", "reward", "± error", "improved", "worsened"),
        [
            (
                f"{p['scale']:g}",
                f"{p['score']:.4f}",
                "-" if p["error"] is None else f"{p['error']:.4f}",
                str(p["improved"]),
                str(p["worsened"]),
            )
            for p in found["curve"]
        ],
        indent="",
    )
    done = f"scale {found['scale']:g}, written into the coefficients of {out}"
    _print({"out": str(out), **found}, json, "\n".join([text, done, *_noted(scaled.notes)]))


@_command
def evaluate(
    steering: Annotated[Path, typer.Option(help="Steering file that `corrsteer select` wrote.")],
    config: Config = None,
    model: Model = None,
    task: TaskName = None,
    grader: Grader = None,
    positions: SteerPositions = None,
    scale: Scale = None,
    split: Split = None,
    prompt_field: PromptField = None,
    answer_field: AnswerField = None,
    chat: Chat = None,
    system: System = None,
    part: Part = None,
    split_seed: SplitSeed = None,
    limit: Limit = None,
    dtype: Dtype = None,
    device: Device = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    batch_tokens: BatchTokens = None,
    batch_size: BatchSize = None,
    json: Json = False,
) -> None:
    """Score a task unsteered and steered. What is not given is as it was when the run was collected.

    By default that is the test part of the task that the steering was collected on.
    """
    from corrsteer.evaluation import evaluate as evaluate_
    from corrsteer.steering import Steering
    from corrsteer.tables import table

    flags = _flags(locals(), "steering")
    loaded = Steering.load(steering)
    given = config_.read(config_.EvaluateSettings, config, flags, _recorded(loaded.provenance, "test"))
    task_ = _task(given)
    model_, tokenizer = _model(given)
    loaded.check(model_)
    result = evaluate_(
        model_, tokenizer, task_, loaded,
        positions=given.positions, scale=given.scale, decoding=_decoding(given),
    )  # fmt: skip
    ratio = "no reward changed" if result.side_effect_ratio is None else f"{result.side_effect_ratio:.3f}"
    text = table(
        ("samples", str(result.n)),
        [
            ("unsteered reward", f"{result.unsteered:.4f}"),
            ("steered reward", f"{result.steered:.4f}"),
            ("improved", str(result.improved)),
            ("worsened", str(result.worsened)),
            ("changed, reward equal", str(result.changed_equal)),
            ("side-effect ratio", ratio),
            ("McNemar exact p", f"{result.p_value:.3g}"),
        ],
        indent="",
    )
    _print(result.to_dict(), json, text)


@_command
def generate(
    steering: Annotated[Path, typer.Option(help="Steering file that `corrsteer select` wrote.")],
    prompt: Annotated[list[str], typer.Option(help="A prompt; give it again for more.")],
    config: Config = None,
    model: Model = None,
    positions: SteerPositions = None,
    scale: Scale = None,
    chat: Chat = None,
    system: System = None,
    dtype: Dtype = None,
    device: Device = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    json: Json = False,
) -> None:
    """Complete prompts unsteered and steered, side by side."""
    from corrsteer.evaluation import grade
    from corrsteer.steering import Steering
    from corrsteer.tasks import Task

    flags = _flags(locals(), "steering", "prompt")
    loaded = Steering.load(steering)
    recorded = _recorded(loaded.provenance, "all") | {"task": "prompts"}
    given = config_.read(config_.EvaluateSettings, config, flags, recorded)
    model_, tokenizer = _model(given)
    loaded.check(model_)
    rows = [{"prompt": text} for text in prompt]
    task = Task.from_rows(
        rows, grader=lambda completion, example: 0.0, answer_field=None, chat=given.chat, system=given.system
    )
    before = grade(model_, tokenizer, task, _decoding(given), progress=False).completions
    with loaded.apply(model_, given.positions, given.scale):
        after = grade(model_, tokenizer, task, _decoding(given), progress=False).completions
    pairs = [{"prompt": p, "unsteered": b, "steered": a} for p, b, a in zip(prompt, before, after)]
    text = "\n".join(f"{p['prompt']!r}\n  unsteered: {p['unsteered']!r}\n  steered:   {p['steered']!r}" for p in pairs)
    _print({"completions": pairs}, json, text)


@_command
def plan(
    frequency: Annotated[float, typer.Option(help="Share of samples in which the feature is active.")] = 0.01,
    activations: Annotated[int, typer.Option(help="Samples in which it should be seen active.")] = 10,
    confidence: Annotated[float, typer.Option(help="Of seeing it that often, and of the intervals.")] = 0.95,
    features: Annotated[int, typer.Option(help="Features of each SAE.")] = 16384,
    layers: Annotated[int, typer.Option(help="Number of layers with an SAE.")] = 1,
    samples: Annotated[int, typer.Option(help="Samples that the run has.")] = 4000,
    alpha: Annotated[float, typer.Option(help="Accepted chance of any false discovery among all features.")] = 0.05,
    power: Annotated[float, typer.Option(help="Chance with which a true correlation should be found.")] = 0.8,
    correlation: Annotated[float, typer.Option(help="Correlation to be found and known well.")] = 0.1,
    reward_rate: Annotated[float, typer.Option(help="Share of samples that are rewarded.")] = 0.5,
    json: Json = False,
) -> None:
    """Say how many samples a run needs, and what it can tell with those it has; no model is run."""
    from corrsteer import planning
    from corrsteer.tables import table

    if not 0 < confidence < 1:
        raise CorrSteerError(f"confidence must be between 0 and 1, got {confidence:g}")
    needed = planning.samples_to_see(activations, frequency, 1 - confidence)
    missed = {n: planning.miss_probability(n, activations, frequency) for n in (samples, needed.as_published)}
    low, high = planning.correlation_bounds(frequency, reward_rate)
    binary = (correlation, samples, frequency, reward_rate, confidence)
    result = {
        "see": {
            **vars(needed),
            "confidence_as_published": 1 - missed[needed.as_published],
            "confidence_with_samples": 1 - missed[samples],
        },
        "detect": {
            "chance_correlation": planning.chance_correlation(samples, features, layers),
            "detectable_correlation": planning.detectable_correlation(samples, features, layers, alpha, power),
            "samples_to_detect": planning.samples_to_detect(correlation, features, layers, alpha, power),
        },
        "know": {
            "interval_width": planning.interval_width(correlation, samples, confidence),
            "interval_width_sparse": planning.interval_width_sparse(*binary) if low <= correlation <= high else None,
            "lowest_possible": low,
            "highest_possible": high,
        },
    }
    see, detect, know = result.values()
    sparse = "r is impossible" if know["interval_width_sparse"] is None else f"{know['interval_width_sparse']:.3f}"
    blocks = {
        f"To see a feature of frequency {frequency:g} active in {activations} samples or more, {confidence:g} sure": [
            ("samples needed", str(needed.exact)),
            ("enough by Chernoff's bound", str(needed.chernoff)),
            ("enough by Hoeffding's bound", str(needed.hoeffding)),
            (f"the paper's formula, {see['confidence_as_published']:.2f} sure", str(needed.as_published)),
            (f"confidence with {samples} samples", f"{see['confidence_with_samples']:.4f}"),
        ],
        f"To tell r from chance, {features} features x {layers} layer(s), alpha {alpha:g}, power {power:g}": [
            (f"largest |r| by chance, {samples} samples", f"{detect['chance_correlation']:.3f}"),
            (f"smallest |r| that is detected, {samples} samples", f"{detect['detectable_correlation']:.3f}"),
            (f"samples needed to detect r = {correlation:g}", str(detect["samples_to_detect"])),
        ],
        f"To know r = {correlation:g}, width of a {confidence:g} interval with {samples} samples": [
            ("activation and reward normal", f"{know['interval_width']:.3f}"),
            (f"feature on in {frequency:g}, reward 1 in {reward_rate:g}", sparse),
            ("r that these two rates allow", f"{low:+.3f} to {high:+.3f}"),
        ],
    }
    _print(result, json, "\n".join(f"{title}\n{table(rows[0], rows[1:])}" for title, rows in blocks.items()))


@_command
def doctor(json: Json = False) -> None:
    """Say what runs on this machine: versions, devices, and each backend with the reason where it does not."""
    from corrsteer import doctor as doctor_

    report = doctor_.examine()
    _print(report, json, doctor_.text(report))


def _flags(given: dict[str, Any], *others: str) -> dict[str, Any]:
    """A command's options but those that are not settings."""
    names = set(config_.CollectSettings.model_fields) | set(config_.EvaluateSettings.model_fields)
    return {name: value for name, value in given.items() if name in names and name not in others}


def _check_folder(out: Path) -> None:
    """See that a file can be written before what goes into it is made."""
    if not out.parent.is_dir():
        raise CorrSteerError(f"out {out} cannot be written: there is no folder {out.parent}")


def _recorded(provenance: dict[str, Any], part: str) -> dict[str, Any]:
    """The settings of a collection, but for what it does not decide: which part of the task, and how to steer."""
    return provenance.get("settings", {}) | {"part": part, "positions": "generated", "limit": None}


def _significance(run):
    """P-values of the correlation by layer, none where there are no permutations."""
    return run.significance() if run.testable() else {}


def _noted(notes: list[str]) -> list[str]:
    return [f"note: {note}" for note in notes]


def _prepare(out: Path, force: bool) -> None:
    """See that a run can be written before it is collected."""
    if (out / "run.json").exists() and not force:
        raise CorrSteerError(f"out {out} already holds a run; give another directory, or --force to replace it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise CorrSteerError(f"out {out} cannot be written to ({error.strerror}); give another directory") from None


def _save_run(run, given: config_.CollectSettings) -> None:
    settings = given.model_dump(mode="json", exclude={"out", "sae"})
    if Path(given.task).exists():
        settings["task"] = str(Path(given.task).resolve())
    if Path(given.model).exists():
        settings["model"] = str(Path(given.model).resolve())
    run.provenance["settings"] = settings
    run.save(given.out)


def _task(given: config_.TaskSettings):
    from corrsteer.tasks import Task

    options = {
        "grader": given.grader, "prompt_field": given.prompt_field, "answer_field": given.answer_field,
        "chat": given.chat, "system": given.system,
    }  # fmt: skip
    if given.task.endswith((".jsonl", ".json")) or Path(given.task).is_file():
        task = Task.from_jsonl(given.task, **options)
    else:
        name, _, config = given.task.partition(":")
        task = Task.from_dataset(name, config or None, split=given.split, **options)
    if given.part != "all":
        parts = dict(zip(("train", "validation", "test"), task.split(seed=given.split_seed)))
        if len(parts[given.part]) == 0:
            raise CorrSteerError(
                f"the {given.part} part of {given.task} is empty, as it has only {len(task)} examples; use --part all"
            )
        task = parts[given.part]
    return task if given.limit is None else task.take(given.limit)


def _encoders(sources: list[str], model) -> dict[int, Any]:
    from corrsteer.encoder import SparseEncoder
    from corrsteer.models import width

    encoders: dict[int, Any] = {}
    for entry in sources:
        layer, separator, source = entry.partition("=")
        if not separator or not layer.isdigit():
            raise CorrSteerError(f"sae must be LAYER=SOURCE, got {entry!r}")
        if int(layer) in encoders:
            raise CorrSteerError(f"sae gives layer {layer} twice; give one SAE a layer")
        if source == "identity":
            encoders[int(layer)] = SparseEncoder.identity(width(model))
        elif ":" in source and not Path(source).is_dir():
            encoders[int(layer)] = SparseEncoder.from_pretrained(*source.split(":", 1))
        else:
            encoders[int(layer)] = SparseEncoder.load(source)
    return encoders


def _model(given: config_.ModelSettings):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    placement: dict[str, Any] = {}
    if given.device != "auto":
        placement["device_map"] = given.device
    elif torch.cuda.is_available():
        placement["device_map"] = "auto"
    dtype = given.dtype if given.dtype == "auto" else getattr(torch, given.dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype, **placement).eval()
        return model, AutoTokenizer.from_pretrained(given.model)
    except (OSError, ValueError, RuntimeError, AssertionError, ImportError) as error:  # they raise as they like
        raise CorrSteerError(f"model {given.model!r} cannot be loaded on device {given.device!r}: {error}") from error


def _decoding(given: config_.ModelSettings):
    from corrsteer.generation import Decoding

    names = ("max_new_tokens", "temperature", "top_p", "seed", "batch_tokens", "batch_size")
    return Decoding(**{name: getattr(given, name) for name in names})


if __name__ == "__main__":
    main()
