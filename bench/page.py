"""A result in words: targets met and missed, predictions beside measurements, and what to try next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import table

PREDICTIONS = Path(__file__).with_name("predictions.json")
VALUES = {  # how a number is written, and what stands behind it
    "ratio": ("{:.2f}", "of {to}'s time"), "ms": ("{:.3g}", "ms"), "memory": ("{:.1%}", "of the dense activations"),
}  # fmt: skip


def words(result: dict[str, Any]) -> list[str]:
    """The last page, a line each."""
    return [
        *_stages(result),
        "Targets:",
        *(f"  {line}" for line in table.targets(result)),
        f"  {_determinism(result)}",
        "Predictions (bench/predictions.json), and what was measured:",
        *(f"  {line}" for line in predicted(result, json.loads(PREDICTIONS.read_text(encoding="utf-8")))),
        f"Next: {next_step(result)}",
    ]


def _stages(result: dict[str, Any]) -> list[str]:
    """What there is; and of what is not, why."""
    lines = [
        f"{name}: {stage['status']}, {stage['of'] - stage['missing']} of {stage['of']}, {stage['seconds']:.0f} s"
        for name, stage in result["stages"].items()
    ]
    for kept in ("checks", "tests", "counters", "sanitizer"):
        reasons: dict[str, list[str]] = {}
        for found in result[kept]:
            if found["status"] in ("wrong", "failed", "skipped"):
                reasons.setdefault(f"{found['status']}: {found.get('reason', '')}", []).append(found["name"])
        lines += [f"  {reason} ({'; '.join(names)})" for reason, names in reasons.items()]
    return ["Stages:", *(f"  {line}" for line in lines)]


def unstable(result: dict[str, Any]) -> list[str]:
    """Cases of which some runs had other bits."""
    return [
        f"{case['name']}, {name}: {found['same_bits']['same']} of {found['same_bits']['runs']} runs have the same bits"
        for case in result["cases"]
        for name, found in case.get("contestants", {}).items()
        if "same_bits" in found and found["same_bits"]["same"] < found["same_bits"]["runs"]
    ]


def _determinism(result: dict[str, Any]) -> str:
    found = [c for case in result["cases"] for c in case.get("contestants", {}).values() if "same_bits" in c]
    if not found:
        return "the same bits run after run: not measured"
    other = unstable(result)
    return "; ".join([f"the same bits run after run: in {len(found) - len(other)} of {len(found)} cases", *other])


def predicted(result: dict[str, Any], predictions: list[dict[str, Any]]) -> list[str]:
    """Each prediction, what was measured, and on which side of it that lies."""
    lines = []
    for p in predictions:
        (form, unit), value = VALUES[p["value"]], measured(result, p)
        low, high = form.format(p["low"]), form.format(p["high"])
        said = f"{p['case']}, {p['of']} ({p['what']}): {low} to {high} {unit.format(to=p.get('to'))}"
        if value is None:
            lines.append(f"{said}, not measured")
            continue
        where = "below" if value < p["low"] else "above" if value > p["high"] else "as predicted"
        lines.append(f"{said}, measured {form.format(value)}: {where}")
    return lines


def measured(result: dict[str, Any], prediction: dict[str, Any]) -> float | None:
    """What a prediction is about, as it was measured; None where it was not."""
    for case in result["cases"]:
        if case["name"] == prediction["case"] and case.get("ratios"):
            found = case["contestants"].get(prediction["of"], {})
            if prediction["value"] == "ratio":
                ratio = case["ratios"].get(prediction["of"], {}).get(prediction["to"])
                return ratio and ratio["median"]
            return found.get({"ms": "median_ms", "memory": "peak_share"}[prediction["value"]])
    return None


def next_step(result: dict[str, Any]) -> str:
    """The one thing to try first, of what was found."""
    wrong = [r["name"] for kept in ("checks", "sanitizer") for r in result[kept] if r["status"] in ("wrong", "failed")]
    if wrong:
        return f"mend what does not hold, times come after: {wrong[0]}."
    if any(found["status"] in ("wrong", "failed") for found in result["tests"]):
        return "mend what the GPU tests found: python -m pytest -m gpu -x."
    if other := unstable(result):
        return f"find what makes the bits differ: {other[0]}."
    if wrong := [case["name"] for case in result["cases"] if case["status"] in ("wrong", "failed")]:
        return f"see what went wrong in this case: {wrong[0]}."
    slow: list[tuple[float, dict[str, Any]]] = []
    for case in result["cases"]:
        if case.get("stage") == "shapes" and case["precision"] != "bf16x2":
            ratios = [of["matmul"]["median"] for of in case.get("ratios", {}).values() if "matmul" in of]
            slow += [(min(ratios), case)] if ratios else []
    if not slow:
        return "measure: no shape has been timed against the bare product yet."
    ratio, case = max(slow, key=lambda pair: pair[0])
    if ratio <= 1.0:
        return "nothing is slower than the bare product in the shapes measured; see the predictions that failed."
    head = f"{case['name']} takes {ratio:.2f} of the bare product's time, most of all shapes;"
    if case["tokens"] <= 512:
        return f"{head} it is small: compare the graph's replay with it, and if launches count, fold them."
    kind = {"fp32": "tf32x3"}.get(case["precision"], "native")
    tune = f"python -m bench.tune --out kernels/configs --kind {kind}"
    return f"{head} {tune} races tiles, and --profile says what stalls."
