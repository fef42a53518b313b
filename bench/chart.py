"""The chart of a CPU's result: how much faster than SAELens in float32, by size and precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# name, precision of the case, whose time is compared, colour
BARS = (
    ("corrsteer, bf16", "bf16", "native", "#0b5394"),
    ("corrsteer, fp32", "fp32", "native", "#6fa8dc"),
    ("SAELens' encode, pooled in torch, bf16", "bf16", "eager bf16", "#b45f06"),
    ("the same, fp32", "fp32", "eager fp32", "#f6b26b"),
)
PRODUCT = "oneDNN, prepacked"
STEPS = 8  # mean kept tokens a sample


def plain(case: dict[str, Any]) -> bool:
    """Whether a case is one of those compared by size: jumprelu, pooled by mean, of usual length."""
    form = (case["kind"], case["activation"], case["pool"], case["steps"])
    return form == ("encode_update", "jumprelu", "mean", STEPS)


def speeds(result: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """By size and precision, how many times as fast as `eager fp32` each contestant is."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for case in result["cases"]:
        if plain(case) and "native" in case["ratios"]:
            size = f"{case['d_in']} × {case['d_sae']}\n{case['tokens']} tokens"
            ratios = case["ratios"]["native"]
            ours = 1 / ratios["eager fp32"]["median"]
            others = {name: ours * ratio["median"] for name, ratio in ratios.items()}
            found.setdefault(size, {})[case["precision"]] = {"native": ours} | others
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the chart as SVG, the same bytes for the same result."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    by_size = sorted(speeds(result).items(), key=lambda item: [int(n) for n in item[0].split() if n.isdigit()])
    with matplotlib.rc_context({"svg.hashsalt": "corrsteer", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
        width = 0.8 / len(BARS)
        for at, (name, precision, contestant, colour) in enumerate(BARS):
            places = [group + (at - (len(BARS) - 1) / 2) * width for group in range(len(by_size))]
            heights = [sizes.get(precision, {}).get(contestant, 0) for _, sizes in by_size]
            bars = axes.bar(places, heights, width, label=name, color=colour)
            axes.bar_label(bars, [f"{h:.1f}" if h else "" for h in heights], fontsize=7, padding=4)
            if contestant == "native":
                product = [sizes.get(precision, {}).get(PRODUCT, 0) for _, sizes in by_size]
                label = "oneDNN's bare product, prepacked" if at == 0 else None
                axes.hlines(
                    product, [p - width / 2 for p in places], [p + width / 2 for p in places], "black", label=label
                )
        axes.set_xticks(range(len(by_size)), [size for size, _ in by_size])
        axes.set_ylabel("times as fast as SAELens in fp32")
        device = result["device"]
        axes.set_title(
            f"encode_update, {STEPS} tokens a sample: {device['name']}, {device['threads']} threads", fontsize=9
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.25)
        axes.legend(fontsize=7, ncols=3, frameon=False, loc="upper center")
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
