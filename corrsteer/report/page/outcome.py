"""What steering did: the sentence at the top, scores, transitions with their examples, side effects."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corrsteer.experiments.evaluation import Evaluation, Interval
from corrsteer.report.page.blocks import (
    Block,
    Cell,
    Fold,
    Missing,
    Part,
    Plot,
    Sample,
    Section,
    Table,
    Variant,
    interval,
    number,
    plot_text,
    shortened,
    words,
)
from corrsteer.report.page.found import Compared, Material
from corrsteer.steering.features import CHANCE

EXAMPLES = 5  # of each kind of change that are shown
EVALUATE = "corrsteer evaluate --steering steering.safetensors --out RUN/evaluation.json"
KINDS = {
    "improved": "The reward rose",
    "worsened": "The reward fell",
    "changed_equal": "Another completion of the same reward",
    "none": "The same completion",
}
Row = tuple[str, str, float, Interval, Evaluation | None]  # name, kind, mean reward and its interval

FLOWS = ("right_to_right", "right_to_wrong", "wrong_to_right", "wrong_to_wrong")


@dataclass(frozen=True)
class Headline:
    """The evaluation that a page is about: of its steerings, baselines left out, the one of the highest score."""

    name: str
    evaluation: Evaluation
    compared: Compared


def headline(material: Material) -> Headline | None:
    """What the page is about; None where nothing was evaluated."""
    found = [
        Headline(name, evaluation, compared)
        for compared in material.compared.values()
        for name, evaluation in compared.evaluations.items()
        if name not in compared.baselines
    ]
    return max(found, key=lambda one: one.evaluation.steered, default=None)


def sentence(material: Material, survivors: int, features: int) -> str:
    """What was steered, what that did to the score, and whether chance explains it."""
    found = headline(material)
    if found is None:
        samples = sum(run.n for run in material.runs.values())
        return (
            f"Of {features} features, {survivors} correlate with the reward of {samples} samples more than chance "
            f"explains; nothing was steered and evaluated yet."
        )
    e, steering = found.evaluation, material.steering_of(found.compared, found.name)
    along = ""
    if steering is not None and steering.features:
        named = ", ".join(feature.name for feature in steering.features[:3])
        more = len(steering.features) - 3
        along = f" along {named}{f' and {more} others' if more > 0 else ''}, at scale {steering.scale:g},"
    verb = "raised" if e.difference > 0 else "lowered" if e.difference < 0 else "left"
    ends = e.difference_interval
    between = "" if ends is None else f" (95 % interval {ends[0]:+.3f} to {ends[1]:+.3f})"
    change = (
        f"from {e.unsteered:.3f} to {e.steered:.3f}, a difference of {e.difference:+.3f}{between}"
        if e.difference
        else f"at {e.unsteered:.3f}{between}"
    )
    several = len(found.compared.evaluations)
    adjusted = f", adjusted to all {several} that were compared" if several > 1 else ""
    chance = "chance alone does not explain that" if e.p_holm <= CHANCE else "chance alone could explain that"
    return (
        f"Steering by {named_shortly(found.name)}{along} {verb} the mean reward of {e.n} samples {change}; {chance} "
        f"(p = {e.p_holm:.2g}{adjusted})."
    )


def scores(material: Material) -> Section:
    """Before and after, of every steering and baseline."""
    blocks: list[Block] = []
    for path, compared in material.compared.items():
        first = next(iter(compared.evaluations.values()))
        rows: list[Row] = [("unsteered", "no steering", first.unsteered, first.unsteered_interval, None)]
        for name, e in compared.evaluations.items():
            kind = "baseline" if name in compared.baselines else "steering"
            rows.append((named_shortly(name), kind, e.steered, e.steered_interval, e))
        table = Table(
            f"Mean reward of {first.n} samples, with 95 % intervals ({named_shortly(path)})",
            ("", "kind", "reward", "95 % interval", "difference", "95 % interval of it", "p", "p, Holm"),
            [
                [
                    words(name), words(kind), number(value), interval(ends),
                    *(
                        [Cell("–")] * 4
                        if e is None
                        else [number(e.difference, "+.3f"), interval(e.difference_interval, "+.3f"),
                              number(e.p_value, ".2g"), number(e.p_holm, ".2g")]
                    ),
                ]
                for name, kind, value, ends, e in rows
            ],
        )  # fmt: skip
        traces = [
            _dots([row for row in rows if row[1] == kind], kind, colour, symbol)
            for kind, colour, symbol in (
                ("no steering", "--muted", "line-ns-open"),
                ("steering", "--c1", "circle"),
                ("baseline", "--c2", "square"),
            )
            if any(row[1] == kind for row in rows)
        ]  # fmt: skip
        names = [plot_text(shortened(name, 36)) for name, *_ in rows]
        layout = {
            "xaxis": {"title": {"text": "mean reward"}},
            "yaxis": {"categoryorder": "array", "categoryarray": names[::-1], "automargin": True},
            "height": 120 + 34 * len(rows),
            "shapes": [_line(first.unsteered)],
        }
        best = max(rows, key=lambda row: row[2])
        said = (
            f"Unsteered the mean reward is {first.unsteered:.3f}. The highest is {best[2]:.3f}, of {best[0]}. Bars are "
            f"95 % intervals."
        )
        blocks.append(Plot(f"Mean reward, {named_shortly(path)}", said, [Variant("all", traces, layout)], table))
    if not blocks:
        blocks.append(Missing("No evaluation was given.", EVALUATE))
    elif not any(compared.baselines for compared in material.compared.values()):
        blocks.append(Missing("No baselines were evaluated.", EVALUATE + " --baselines RUN"))
    return Section("scores", "Scores before and after", blocks)


def transitions(material: Material) -> Section:
    """Which samples changed, with examples of each change."""
    blocks: list[Block] = []
    main = headline(material)
    for compared in material.compared.values():
        for name, e in compared.evaluations.items():
            first = main is not None and e is main.evaluation
            if name in compared.baselines:
                continue
            blocks.append(
                Fold(f"{named_shortly(name)}: {e.improved} rose, {e.worsened} fell", _changes(name, e), first)
            )
    blocks.sort(key=lambda block: isinstance(block, Fold) and not block.opened)
    return Section("changes", "What changed", blocks or [Missing("No evaluation was given.", EVALUATE)])


def side_effects(material: Material) -> Section:
    """What steering cost: rewards that fell, completions that changed for nothing, categories, speed."""
    blocks: list[Block] = []
    for path, compared in material.compared.items():
        blocks.append(
            Table(
                f"Side effects ({named_shortly(path)}); the ratio is the share of changed rewards that fell",
                ("", "fell", "rose", "side-effect ratio", "changed, equal reward", "tokens/s unsteered",
                 "tokens/s steered"),
                [
                    [
                        words(named_shortly(name)), number(e.worsened, "d"), number(e.improved, "d"),
                        number(e.side_effect_ratio), number(e.changed_equal, "d"),
                        number(e.unsteered_tokens_per_second, ".0f"), number(e.steered_tokens_per_second, ".0f"),
                    ]
                    for name, e in compared.evaluations.items()
                ],
            )
        )  # fmt: skip
        rows = [
            [words(category), words(named_shortly(name)), number(of.n, "d"), number(of.unsteered), number(of.steered),
             number(of.difference, "+.3f"), interval(of.difference_interval, "+.3f")]
            for name, e in compared.evaluations.items()
            for category, of in e.categories.items()
        ]  # fmt: skip
        if rows:
            header = ("category", "steering", "samples", "unsteered", "steered", "difference", "95 % interval")
            blocks.append(Table("By category; intervals are not adjusted to each other", header, rows))
        else:
            blocks.append(Missing("The evaluation has no categories.", EVALUATE + " --category-field FIELD"))
    return Section("side-effects", "Side effects", blocks or [Missing("No evaluation was given.", EVALUATE)])


def difference_of(before: str, after: str) -> tuple[list[Part], list[Part]]:
    """Both texts with what differs marked: all but what they begin and end with alike."""
    most, head = min(len(before), len(after)), 0
    while head < most and before[head] == after[head]:
        head += 1
    while head and any(_continues(text[head:]) for text in (before, after)):
        head -= 1  # a mark does not begin inside of a character
    tail = 0
    while tail < most - head and before[-1 - tail] == after[-1 - tail]:
        tail += 1
    while tail and _continues(before[len(before) - tail :]):
        tail -= 1

    def parts(text: str) -> list[Part]:
        end = len(text) - tail
        cut = (Part(text[:head]), Part(text[head:end], marked=True), Part(text[end:]))
        return [part for part in cut if part.text]

    return parts(before), parts(after)


def named_shortly(path: str) -> str:
    """A file's name without its folders and ending; other names as they are."""
    return Path(path).stem if path.endswith((".safetensors", ".json")) else path


def _continues(text: str) -> bool:
    """Whether a text begins within a character: with a mark that combines, or what joins two."""
    if not text:
        return False
    toned = "\U0001f3fb" <= text[0] <= "\U0001f3ff"  # an emoji's colour of skin
    return toned or text[0] in "\u200d\ufe0f" or unicodedata.combining(text[0]) != 0


def _dots(rows: list[Row], kind: str, colour: str, symbol: str) -> dict[str, Any]:
    lengths = [(0.0, 0.0) if ends is None else (value - ends[0], ends[1] - value) for *_, value, ends, _ in rows]
    return {
        "type": "scatter", "mode": "markers", "name": kind,
        "x": [row[2] for row in rows], "y": [plot_text(shortened(row[0], 36)) for row in rows],
        "error_x": {"type": "data", "symmetric": False, "array": [high for _, high in lengths],
                    "arrayminus": [low for low, _ in lengths], "color": colour},
        "marker": {"color": colour, "size": 11, "symbol": symbol, "line": {"width": 2, "color": colour}},
        "hovertemplate": "%{y}: %{x:.3f}<extra></extra>",
    }  # fmt: skip


def _line(at: float) -> dict[str, Any]:
    return {
        "type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper",
        "line": {"color": "--muted", "dash": "dot", "width": 1.5},
    }  # fmt: skip


def _changes(name: str, e: Evaluation) -> list[Block]:
    counts = [e.transitions[flow] for flow in FLOWS]
    table = Table(
        f"Samples by reward before and after, {named_shortly(name)}",
        ("before", "after", "samples"),
        [[*map(words, flow.split("_to_")), number(n, "d")] for flow, n in zip(FLOWS, counts)],
    )
    said = (
        f"Of {e.n} samples {counts[0]} were right and stayed right, {counts[1]} went from right to wrong, {counts[2]} "
        f"from wrong to right, and {counts[3]} stayed wrong. Right is a reward above 0."
    )
    trace = {
        "type": "sankey", "arrangement": "fixed",
        "node": {"label": ["right before", "wrong before", "right after", "wrong after"], "pad": 24, "thickness": 16,
                 "color": ["--c1", "--c2", "--c1", "--c2"], "x": [0.001, 0.001, 0.999, 0.999],
                 "y": _places(counts)},
        "link": {"source": [0, 0, 1, 1], "target": [2, 3, 2, 3], "value": counts,
                 "color": ["--c1-soft", "--c2-soft", "--c1-soft", "--c2-soft"]},
    }  # fmt: skip
    blocks: list[Block] = [
        Plot(f"From before to after, {named_shortly(name)}", said, [Variant("all", [trace], {"height": 260})], table)
    ]
    for kind, title in KINDS.items():
        of_kind = [example for example in e.examples if example["change"] == kind]
        if of_kind:
            shown = of_kind[:EXAMPLES]
            how_many = f"{len(of_kind)}" if len(shown) == len(of_kind) else f"{len(shown)} of {len(of_kind)}"
            blocks.append(Fold(f"{title} ({how_many} shown)", list(map(_example, shown)), kind == "improved"))
    if not e.examples:
        blocks.append(Missing("The evaluation has no examples.", EVALUATE))
    return blocks


def _places(counts: list[int]) -> list[float]:
    """Where the middles of the nodes stand, from the top: right above wrong on both sides."""
    n = max(sum(counts), 1)
    before, after = (counts[0] + counts[1]) / n, (counts[0] + counts[2]) / n
    return [min(max(place, 0.01), 0.99) for right in (before, after) for place in (right / 2, (1 + right) / 2)]


def _example(example: dict[str, Any]) -> Sample:
    before, after = difference_of(str(example["before"]), str(example["after"]))
    texts = [("Prompt", [Part(str(example["prompt"]))]), ("Before", before), ("After", after)]
    if example.get("answer") is not None:
        texts.insert(1, ("Answer", [Part(str(example["answer"]))]))
    rewards = f"reward {example['reward_before']:g} to {example['reward_after']:g}"
    category = example.get("category")
    return Sample(rewards if category is None else f"{rewards}, {category}", texts)


def all_notes(material: Material) -> Iterator[tuple[str, list[str]]]:
    """Notes by the name of what they are of."""
    for name, run in material.runs.items():
        yield name, run.notes
    for name, steering in material.steerings.items():
        yield name, steering.notes
    for compared in material.compared.values():
        for name, evaluation in compared.evaluations.items():
            yield f"evaluation of {named_shortly(name)}", evaluation.notes
