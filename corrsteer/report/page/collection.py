"""What a collection saw: who led as samples came, rewards and lengths, what it takes, and how it came about."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from corrsteer.files import to_json
from corrsteer.report.page.blocks import (
    Block,
    Cell,
    Fold,
    Missing,
    Notes,
    Paragraph,
    Plot,
    Section,
    Source,
    Table,
    Variant,
    interval,
    number,
    plot_text,
    words,
)
from corrsteer.report.page.features import Surveyed
from corrsteer.report.page.found import Material
from corrsteer.report.page.outcome import all_notes, named_shortly
from corrsteer.runs.run import Run
from corrsteer.stats.stability import settled_at

BARS = 30  # of a histogram
COLOURS = ("--c1", "--c2", "--c3", "--c4", "--c5")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")  # so that lines differ by more than colour
SOURCES: dict[str, Callable[[dict[str, Any]], str]] = {  # of an SAE, as --sae takes them
    "directory": lambda source: source["directory"],
    "release": lambda source: f"{source['release']}:{source['sae_id']}",
    "identity": lambda source: "identity",
}
PLAN = "corrsteer plan --memory"
RUN = "corrsteer run RECIPE --out RUN"
COLLECT = "corrsteer collect ... --out RUN"


def runs(material: Material, surveyed: dict[str, Surveyed]) -> Section:
    """The runs, side by side."""
    rows = []
    for name, run in material.runs.items():
        of_run = surveyed[name]
        layer, index, r, _ = of_run.survivors[0] if of_run.survivors else (None, None, None, None)
        rows.append([
            words(name), words(run.provenance.get("model", "unknown")), number(run.n, "d"),
            number(float(run.rewards.nanmean()), ".3f"), number(len(run.points), "d"), number(run.n_features, "d"),
            number(len(of_run.survivors), "d"), words("none" if layer is None else f"{layer}/{index}"),
            number(r, "+.3f"), number(of_run.bound, ".3f"),
        ])  # fmt: skip
    header = ("run", "model", "samples", "mean reward", "layers", "features", "beyond chance", "best of them", "its r",
              "chance gives |r|")  # fmt: skip
    return Section("runs", "Runs", [Table("The runs that this page is about", header, rows)])


def progress(material: Material) -> Section:
    """Who led after how many samples."""
    blocks: list[Block] = []
    for name, run in material.runs.items():
        if not run.snapshots:
            blocks.append(Missing(f"{name} holds no snapshots, as those of a run that was regraded.", COLLECT))
            continue
        last = run.snapshots[-1].leaders
        layers = sorted((layer for layer in last if last[layer]), key=lambda layer: -last[layer][0].r)
        traces = [_leaders(run, layer, at) for at, layer in reversed(list(enumerate(layers)))]
        settled = settled_at(run.snapshots)
        table = Table(
            f"The leader of each layer at the end, {name}",
            ("layer", "feature", "r", "95 % interval", "leads since"),
            [
                [Cell(str(layer), layer), number(best.feature, "d"), number(best.r, "+.3f"),
                 interval((best.low, best.high), "+.3f"), number(settled[layer], "d")]
                for layer in sorted(layers)
                for best in last[layer][:1]
            ],
        )  # fmt: skip
        front = layers[0] if layers else None
        said = f"The highest r of each layer, at {len(run.snapshots)} time(s) up to {run.snapshots[-1].n} samples."
        if front is not None:
            best = last[front][0]
            said += (
                f" At the end layer {front} leads with feature {best.feature}, r {best.r:+.3f}, since {settled[front]}."
            )
        axes = {
            "xaxis": {"title": {"text": "samples"}},
            "yaxis": {"title": {"text": "highest r of a layer"}},
            "height": 380,
        }
        blocks.append(Plot(f"Highest r over samples, {name}", said, [Variant("all", traces, axes)], table))
    return Section("progress", "Progress over samples", blocks)


def distributions(material: Material) -> Section:
    """Rewards and lengths."""
    blocks: list[Block] = []
    for name, run in material.runs.items():
        for reward, values in run.all_rewards().items():
            blocks.append(_histogram(f"Reward {reward!r}, {name}", "reward", values[values.isfinite()].cpu().numpy()))
        rollouts = [rollout for rollout in run.rollouts if rollout is not None]
        lengths = [len(rollout.completion_ids) for rollout in rollouts if rollout.completion_ids is not None]
        if lengths:
            blocks.append(_histogram(f"Length of completions, {name}", "tokens", np.array(lengths)))
        else:
            blocks.append(Missing(f"{name} holds no completions with their tokens.", COLLECT))
    return Section("distributions", "Rewards and lengths", blocks)


def cost(material: Material) -> Section:
    """Time and memory."""
    rows = []
    for name, run in material.runs.items():
        parts = {
            "moments": sum(m.nbytes for pools in run.moments.values() for m in pools.values()),
            "evidence": sum(e.nbytes for pools in run.evidence.values() for e in pools.values()),
            "activations of samples": 0 if run.activations is None else run.activations.nbytes,
            "the directory": _size(Path(name)),
        }
        rows += [[words(part), words(name), number(n / 2**20, ".2f")] for part, n in parts.items() if n]
    blocks: list[Block] = [Table("What the runs take, in MiB", ("part", "run", "MiB"), rows)]
    speeds = [
        [words(named_shortly(name)), words(named_shortly(path)), number(e.unsteered_tokens_per_second, ".0f"),
         number(e.steered_tokens_per_second, ".0f")]
        for path, compared in material.compared.items()
        for name, e in compared.evaluations.items()
    ]  # fmt: skip
    if speeds:
        header = ("steering", "evaluation", "tokens/s unsteered", "tokens/s steered")
        blocks.append(Table("Speed of the evaluations", header, speeds))
    stages = [
        [words(stage), words(name), number(seconds, ".1f")]
        for name, of_run in material.stages.items()
        for stage, seconds in of_run.items()
    ]
    if stages:
        blocks.append(Table("What each step took, in seconds", ("step", "run", "seconds"), stages))
    else:
        blocks.append(Missing("How long each step took is recorded by `corrsteer run`.", RUN))
    blocks.append(Missing("What a collection takes of memory can be planned.", PLAN))
    return Section("cost", "Time and memory", blocks)


def provenance(material: Material) -> Section:
    """Everything that is needed to repeat it."""
    blocks: list[Block] = []
    for name, run in material.runs.items():
        described = run.provenance
        versions = ", ".join(f"{package} {version}" for package, version in described.get("versions", {}).items())
        task = {"name": "unknown", "part": "unknown", "grader": "unknown"} | described.get("task", {})
        samples = described.get("samples", {})
        hashes = blake2b(str(samples.get("prompt_hashes", "")).encode(), digest_size=16).hexdigest()
        facts = {
            "model": f"{described.get('model', 'unknown')} in {described.get('model_dtype', 'an unknown dtype')}",
            "engine": ", ".join(map(str, described.get("engine", []))) or "unknown",
            "task": f"{task['name']}, part {task['part']}, grader {task['grader']}",
            "samples": f"{run.n}; hash of their prompts {hashes}" if samples else str(run.n),
            "pooling": f"{run.pool} for r, {run.coefficient_pool} for coefficients",
            "positions": described.get("positions", "unknown"),
            "decoding": to_json(described.get("decoding", {})),
            "permutations": run.permutations,
            "seed of permutations": described.get("shuffle_seed", "unknown"),
            "versions": versions or "unknown",
        }
        rows = [[words(fact), words(value)] for fact, value in facts.items()]
        blocks.append(Table(f"How {name} came about", ("", "what it was"), rows))
        if (command := collect_command(described)) is not None:
            blocks += [Paragraph(f"This collects the same as {name}:"), Source(command)]
        elif described.get("settings"):
            said = f"{name} was not made from a task by one command; what it was made from is recorded below."
            blocks.append(Paragraph(said))
        saes = described.get("saes", {})
        rows = [
            [Cell(layer, float(layer)), words(run.points.get(int(layer), "")), words(of_layer.get("encoder", "")),
             words(_source(of_layer.get("source", {})))]
            for layer, of_layer in saes.items()
        ]  # fmt: skip
        if rows:
            blocks.append(Table(f"SAEs of {name}", ("layer", "hook point", "encoder", "from"), rows))
        blocks.append(Fold(f"All that {name} records", [Source(to_json(without_hashes(described), indent=1))]))
    for name, steering in material.steerings.items():
        chosen = steering.provenance.get("selection")
        title = f"All that {named_shortly(name)} records, digest {steering.digest}"
        blocks.append(Fold(title, [Source(to_json(without_hashes(steering.provenance), indent=1))]))
        if chosen:
            command = select_command(name, steering.provenance)
            blocks += [Paragraph(f"{named_shortly(name)} was selected by:"), Source(command)]
    if not material.steerings:
        blocks.append(Missing("No steering was given.", "corrsteer select RUN --out RUN/steering.safetensors"))
    return Section("provenance", "Provenance", blocks)


def notes(material: Material) -> Section:
    """Warnings and notes."""
    blocks: list[Block] = []
    for name, found in all_notes(material):
        if found:
            blocks += [Paragraph(f"{named_shortly(name)}:"), Notes(list(dict.fromkeys(found)))]
    return Section("notes", "Warnings and notes", blocks or [Paragraph("There are none.")])


def collect_command(described: dict[str, Any]) -> str | None:
    """The command that collects the same; None of a run of rollouts, rewards or SAEs that no command can be given."""
    settings = described.get("settings", {})
    of_task = settings.get("model") is not None and settings.get("task") is not None
    if not of_task or settings.get("grader") == ["none"]:
        return None
    arguments = ["corrsteer", "collect", "--out", "RUN"]
    for layer, of_layer in described.get("saes", {}).items():
        source = of_layer.get("source", {})
        if source.get("kind") not in SOURCES:
            return None
        arguments += ["--sae", f"{layer}={SOURCES[source['kind']](source)}"]
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            arguments.append(flag)
        elif value is not None and value is not False:
            for one in value if isinstance(value, list) else [value]:
                arguments += [flag, str(one)]
    return shlex.join(arguments)


def select_command(out: str, provenance: dict[str, Any]) -> str:
    """The command that makes the same choices; model, validation and search options are as they were by default."""
    chosen = provenance["selection"]
    arguments = ["corrsteer", "select", "RUN", "--out", out]
    for name in ("strategy", "score", "alpha", "correction", "interval", "coefficient", "direction", "top_k"):
        if chosen.get(name) is not None:
            arguments += [f"--{name.replace('_', '-')}", str(chosen[name])]
    for layer in chosen.get("layers") or ():
        arguments += ["--layer", str(layer)]
    for name, value in (("reward", provenance.get("reward")), ("samples", provenance.get("first_samples"))):
        if value is not None:
            arguments += [f"--{name}", str(value)]
    return shlex.join(arguments)


def without_hashes(described: Any) -> Any:
    """The same with hashes of prompts, 8 bytes a prompt, told by their own hash."""
    if isinstance(described, dict):
        return {
            key: f"blake2b {blake2b(value.encode(), digest_size=16).hexdigest()}"
            if key == "prompt_hashes" and isinstance(value, str)
            else without_hashes(value)
            for key, value in described.items()
        }
    return [without_hashes(one) for one in described] if isinstance(described, list) else described


def _source(source: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in source.items())


def _size(directory: Path) -> int:
    """Bytes of a run's own files; 0 for a run that was not read from a directory."""
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file()) if directory.is_dir() else 0


def _leaders(run: Run, layer: int, at: int) -> dict[str, Any]:
    found = [(snapshot.n, snapshot.leaders[layer][0]) for snapshot in run.snapshots if snapshot.leaders.get(layer)]
    named = at < len(COLOURS)
    return {
        "type": "scatter", "mode": "lines+markers" if named else "lines", "name": f"layer {layer}", "showlegend": named,
        "x": [n for n, _ in found], "y": [round(best.r, 4) for _, best in found],
        "text": [f"layer {layer} feature {best.feature}" for _, best in found],
        "line": {"color": COLOURS[at] if named else "--faint", "dash": DASHES[at] if named else "solid",
                 "width": 2.5 if named else 1},
        "hovertemplate": "%{text}: r %{y:+.3f} after %{x} samples<extra></extra>",
    }  # fmt: skip


def _histogram(title: str, what: str, values: Any) -> Plot:
    """Bars of how many; of few different values, a bar each."""
    distinct = np.unique(values)
    if len(distinct) <= BARS:
        heights, labels = [int((values == value).sum()) for value in distinct], [f"{value:g}" for value in distinct]
        x: list[Any] = [plot_text(label) for label in labels]
    else:
        counts, edges = np.histogram(values, BARS)
        heights, x = counts.tolist(), [round(float(middle), 4) for middle in (edges[:-1] + edges[1:]) / 2]
        labels = [f"{low:.4g} to {high:.4g}" for low, high in zip(edges, edges[1:])]
    trace = {
        "type": "bar", "x": x, "y": heights, "text": labels, "textposition": "none", "marker": {"color": "--c1"},
        "hovertemplate": f"{what} %{{text}}: %{{y}}<extra></extra>",
    }  # fmt: skip
    axis: dict[str, Any] = {"title": {"text": what}}
    axis |= {"type": "category"} if len(distinct) <= BARS else {}
    layout = {"height": 300, "xaxis": axis, "yaxis": {"title": {"text": "samples"}}, "bargap": 0.08}
    said = f"{len(values)} samples."
    if len(values):
        median = float(np.median(values))
        said += f" Mean {values.mean():.4g}, least {values.min():g}, median {median:g}, most {values.max():g}."
    table = Table(title, (what, "samples"), [[Cell(label), number(n, "d")] for label, n in zip(labels, heights)])
    return Plot(title, said, [Variant("all", [trace], layout)], table)
