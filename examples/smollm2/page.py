"""The tables of a result, in Markdown for the documents and as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from corrsteer.report.tables import table
from corrsteer.steering.features import CHANCE

Rows = list[tuple[str, ...]]

SAES = (
    "layer",
    "norm, first token",
    "norm, median",
    "norm, largest",
    "explained variance",
    "dead features",
    "training, s",
)
FOUND = ("task", "prompts", "right", "layer", "significant features", "best r", "its p")
RESULTS = (
    "task", "steering", "features", "scale", "test", "difference", "p (Holm)", "right to wrong", "wrong to right",
    "side effects",
)  # fmt: skip
FEATURES = ("task", "feature", "chosen by", "r", "p", "active tokens", "most active at")
TIMES = (
    "task",
    "prompts",
    "search, completions",
    "rollouts",
    "collection",
    "pruning",
    "search",
    "baselines",
    "evaluation",
    "all",
)
COMPARED = (
    "job", "samples", "published, s a sample", "corrsteer, s a sample", "published / corrsteer", "by round"
)  # fmt: skip
STRATEGIES = {"single": "S", "all": "A", "pruned": "P", "search": "search"}


def sae_rows(result: dict[str, Any]) -> Rows:
    """Norms of what was trained on, and how good each SAE is on held-out tokens."""
    norms, rows = result["activations"]["norms"], []
    for layer, quality in result["saes"].items():
        seen = (f"{norms[layer][name]:.0f}" for name in ("first", "median", "most"))
        good = (f"{quality['explained']:.3f}", f"{quality['dead']} of {quality['d_sae']}")
        rows.append((layer, *seen, *good, f"{quality['cpu_seconds']:.0f}"))
    return rows


def found_rows(result: dict[str, Any]) -> Rows:
    """How many features go with the reward beyond chance, and the best of each layer."""
    rows = []
    for name, of_task in result["tasks"].items():
        rollouts = of_task["rollouts"]
        first = (name, str(rollouts["n"]), f"{rollouts['reward']:.2f}")
        for layer, found in of_task["collection"]["layers"].items():
            said = (layer, str(found["significant"]), f"{found['r']:+.2f}", _p(found["p_adjusted"]))
            rows.append((*first, *said))
            first = ("", "", "")
    return rows


def result_rows(result: dict[str, Any]) -> Rows:
    """What each steering does on the test part."""
    rows = []
    for name, of_task in result["tasks"].items():
        results, kept = of_task["evaluation"]["steerings"], _steerings(of_task)
        plain = next(iter(results.values()))
        rows.append((name, "none", "", "", _interval(plain, "unsteered"), "", "", "", "", ""))
        for shown, one in results.items():
            moved, ratio = one["transitions"], one["side_effect_ratio"]
            rows.append((
                "", shown, str(len(kept[shown]["features"])), f"{kept[shown]['scale']:g}", _interval(one, "steered"),
                _interval(one, "difference", "+"), _p(one["p_holm"]), str(moved["right_to_wrong"]),
                str(moved["wrong_to_right"]), _number(ratio, ".2f"),
            ))  # fmt: skip
    return rows


def feature_rows(result: dict[str, Any]) -> Rows:
    """The features that were chosen, what chose them, and the tokens at which they are most active."""
    rows = []
    for name, of_task in result["tasks"].items():
        top = {(one["layer"], one["index"]): one for one in of_task["features"]["top_tokens"]}
        chosen: dict[tuple[int, int], tuple[list[str], dict[str, Any]]] = {}
        for stage, strategy in (("single_and_all", "single"), ("single_and_all", "all"), ("pruning", "pruned"),
                                ("search", "search")):  # fmt: skip
            for feature in of_task[stage][strategy]["features"]:
                known = chosen.setdefault((feature["layer"], feature["index"]), ([], feature))
                known[0].append(STRATEGIES[strategy] + (" (-)" if feature["coefficient"] < 0 else ""))
        for (layer, index), (by, feature) in sorted(chosen.items()):
            seen = top[layer, index]
            tokens = " ".join(f"`{_shown(one['token'])}`" for one in seen["top"])
            r, p = _number(feature["r"], "+.2f"), _p(feature["p_adjusted"])
            rows.append((name, f"L{layer} #{index}", ", ".join(by), r, p, f"{seen['active']:.1%}", tokens))
            name = ""
    return rows


def time_rows(result: dict[str, Any]) -> Rows:
    """CPU seconds of each stage."""
    rows = []
    for name, of_task in result["tasks"].items():
        seconds = [of_task[stage]["cpu_seconds"] for stage in TIMES[3:-1]]
        prompts, spent = " + ".join(map(str, of_task["samples"])), f"{of_task['search']['completions']}"
        rows.append((name, prompts, f"{spent} of {of_task['budget']}", *map("{:.0f}".format, [*seconds, sum(seconds)])))
    return rows


def comparison_rows(result: dict[str, Any]) -> Rows:
    """Seconds a sample by each way."""
    rows = []
    for job in ("collection", "pruning") if result["comparison"] else ():
        of_job = result["comparison"][job]
        seconds = of_job["cpu_seconds_a_sample"]
        spread = f"{min(of_job['ratios']):.1f} to {max(of_job['ratios']):.1f}"
        said = (f"{seconds['published']:.3g}", f"{seconds['corrsteer']:.3g}", f"{of_job['ratio']:.1f}", spread)
        rows.append((job, str(of_job["n"]), *said))
    return rows


def opening(result: dict[str, Any]) -> list[str]:
    """What was measured on what."""
    asked, made, device = result["options"], result["activations"], result["device"]
    versions = ", ".join(f"{name} {version}" for name, version in result["packages"].items() if version)
    return [
        f"{device['name']}, {device['instructions']}, {device['threads']} thread(s); {versions}; corrsteer "
        f"{result['corrsteer']} at {(result['commit'] or 'an unknown commit')[:12]}; {result['date'][:10]}",
        f"{made['texts']} texts of at most {asked['text_tokens']} tokens and the tasks' train prompts: "
        f"{made['tokens']} tokens, of which {made['training']} are trained on and the others held out",
        f"top {asked['k']} of {asked['d_sae']} features, {asked['steps']} steps of {asked['batch']} tokens",
    ]


def agreement(result: dict[str, Any]) -> list[str]:
    """Whether the published way and ours find the same."""
    compared = result["comparison"]
    if compared is None:
        return ["not measured yet"]
    found = compared["check"]
    rewards = "the same rewards" if found["same_rewards"] else "other rewards"
    return [
        f"Task `{compared['task']}`, at most {compared['new_tokens']} new tokens, {len(compared['layers'])} layers. "
        f"CPU seconds, medians of {compared['collection']['rounds']} rounds in which both take turns.",
        f"Both ways in float32, {found['n']} samples: {rewards}, {found['same_features']} of {found['features']} "
        f"best features the same, r apart by at most {found['r_apart']:.1g}.",
    ]  # fmt: skip


def verdicts(result: dict[str, Any]) -> list[str]:
    """A line a task: which steerings differ from none on the test part."""
    lines = []
    for name, of_task in result["tasks"].items():
        results = of_task["evaluation"]["steerings"]
        told = {
            word: [shown for shown, one in results.items() if one["p_holm"] <= CHANCE and sign * one["difference"] > 0]
            for word, sign in (("better", 1), ("worse", -1))
        }
        words = [f"{word} than unsteered: {', '.join(names)}" for word, names in told.items() if names]
        lines.append(f"`{name}` ({of_task['about']}): {'; '.join(words) or 'no steering differs from none'}")
    return lines


def nothing(result: dict[str, Any]) -> list[str]:
    """For tables that speak for themselves."""
    return []


# By name: what is said before a table, its header and its rows.
PARTS: dict[str, tuple[Callable[[dict[str, Any]], list[str]], tuple[str, ...], Callable[[dict[str, Any]], Rows]]] = {
    "saes": (opening, SAES, sae_rows),
    "found": (nothing, FOUND, found_rows),
    "results": (verdicts, RESULTS, result_rows),
    "features": (nothing, FEATURES, feature_rows),
    "times": (nothing, TIMES, time_rows),
    "compared": (agreement, COMPARED, comparison_rows),
}


def text(result: dict[str, Any]) -> str:
    """All of it, for a terminal."""
    return "\n\n".join(
        "\n".join([*lines(result), table(header, rows(result), indent="")]) for lines, header, rows in PARTS.values()
    )


def _steerings(of_task: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was kept of each steering, by the name that it is evaluated under."""
    of_ours = of_task["single_and_all"] | {name: of_task[stage][name] for stage, name in
                                           (("pruning", "pruned"), ("search", "search"))}  # fmt: skip
    named = {("search" if name == "search" else f"CorrSteer-{STRATEGIES[name]}"): of_ours[name] for name in STRATEGIES}
    return named | {name: one for name, one in of_task["baselines"].items() if isinstance(one, dict)}


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _p(value: float | None) -> str:
    return "<0.001" if value is not None and value < 0.001 else _number(value, ".3f")


def _interval(one: dict[str, Any], name: str, sign: str = "") -> str:
    """A number with its interval."""
    ends = one[f"{name}_interval"]
    shown = "" if ends is None else f" [{ends[0]:{sign}.2f}, {ends[1]:{sign}.2f}]"
    return f"{one[name]:{sign}.3f}{shown}"


def _shown(token: str) -> str:
    """A token as a cell of a table can show it; two hyphens as others, as code that begins with them is an option."""
    return token.replace("--", "\u2010\u2010").replace(" ", "·").replace("\n", "⏎").replace("|", "¦").replace("`", "ˋ")
