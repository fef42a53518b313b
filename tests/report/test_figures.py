"""The paper's figures: what they draw, and files that a two-column page takes."""

import re
from dataclasses import replace

import pytest
import report_material
from PIL import Image
from typer.testing import CliRunner

from corrsteer.cli import app
from corrsteer.errors import CorrSteerError
from corrsteer.report import figures
from corrsteer.report.page.found import Compared, Material
from corrsteer.stats.stability import Leader, Snapshot
from corrsteer.steering.features import Feature

NAMES = ("mmlu_$x^2$", "<gsm8k>")
KINDS = ("progress", "correlation", "frequency")


def selected_on(n, strategy="all", steered=0.5):
    """A steering of n samples, and its evaluation."""
    steering = report_material.steering()
    steering.provenance = {"n": n, "selection": {"strategy": strategy}}
    interval = (steered - 0.1, steered + 0.1)
    return steering, replace(report_material.evaluation(), steered=steered, steered_interval=interval)


def material(*found):
    """Of steerings and evaluations, by names of their own."""
    named = {f"{at}.safetensors": one for at, one in enumerate(found)}
    evaluations = {name: evaluation for name, (_, evaluation) in named.items()}
    compared = {"e.json": Compared(evaluations | {"random": report_material.evaluation()}, {"random": {}})}
    return Material({"run": report_material.run()}, {name: steering for name, (steering, _) in named.items()}, compared)


@pytest.fixture(scope="module")
def draw():
    """kind -> draws it of two tasks into a file."""
    runs = {name: report_material.run(seed=at) for at, name in enumerate(NAMES)}
    grown = dict.fromkeys(NAMES, material(selected_on(100), selected_on(200, steered=0.6)))
    return {
        "progress": lambda out: figures.progress(grown, out),
        "correlation": lambda out: figures.correlation(runs, out),
        "frequency": lambda out: figures.frequency(runs, out),
    }


def test_progress_is_the_score_of_each_strategy_by_the_samples_it_was_selected_on():
    of = material(selected_on(200, steered=0.7), selected_on(100), selected_on(100, "single", 0.3))
    unsteered, curves = figures.scores("run", of)
    assert unsteered == 0.4
    assert curves == {"all": [(100, 0.5, 0.4, 0.6), (200, 0.7, 0.6, pytest.approx(0.8))],
                      "single": [(100, 0.3, pytest.approx(0.2), 0.4)]}  # fmt: skip
    steering, evaluation = selected_on(300)
    without = material((steering, replace(evaluation, steered_interval=None)), selected_on(100))
    assert figures.scores("run", without)[1]["all"][1] == (300, 0.5, None, None)


def test_progress_needs_several_counts_of_samples_scored_on_the_same(tmp_path):
    with pytest.raises(CorrSteerError, match=r"several numbers of samples, has 100; corrsteer select RUN --samples N"):
        figures.progress({"run": material(selected_on(100), selected_on(100, "single"))}, tmp_path / "f.pdf")
    with pytest.raises(CorrSteerError, match="several numbers of samples, has none"):
        figures.progress({"run": material()}, tmp_path / "f.pdf")
    with pytest.raises(CorrSteerError, match="has several for all on 100 samples; move the others elsewhere"):
        figures.progress({"run": material(selected_on(100), selected_on(100, steered=0.6))}, tmp_path / "f.pdf")
    steering, evaluation = selected_on(200)
    elsewhere = material(selected_on(100), (steering, replace(evaluation, unsteered=0.3)))
    with pytest.raises(CorrSteerError, match=r"of the same samples, but unsteered their scores are 0\.3, 0\.4"):
        figures.progress({"run": elsewhere}, tmp_path / "f.pdf")


def test_correlation_is_the_highest_r_of_any_layer_after_each_count_of_samples():
    run = report_material.run()
    run.snapshots = [
        Snapshot(10, {1: (Leader(3, 0.5, 0.4, 0.6),), 2: (Leader(4, 0.7, None, None),)}),
        Snapshot(20, {1: (Leader(3, 0.6, 0.5, 0.7),), 2: ()}),
    ]
    assert figures.leaders("run", run) == [(10, 0.7, None, None), (20, 0.6, 0.5, 0.7)]


def test_frequencies_are_those_of_the_features_that_were_selected():
    run = report_material.run()
    share = 100 * float(run.moments[2]["max"].frequency()[7])
    assert figures.frequencies(run, [Feature("blocks.2.hook_resid_post", 1.0, 2, 7)]) == [pytest.approx(share)]
    assert figures.frequencies(run, [Feature("blocks.2.hook_resid_post")]) == []
    assert figures.frequencies(run) == [100.0, 100.0]  # feature 3 of each layer, which is the best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", figures.FORMATS)
def test_a_figure_is_as_wide_as_a_column_and_the_same_bytes_each_time(kind, form, draw, tmp_path):
    paths = [tmp_path / f"{at}.{form}" for at in range(2)]
    for path in paths:
        draw[kind](path)
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    if form == "png":
        assert Image.open(paths[0]).size == (975, 660)  # 3.25 by 2.2 inches at 300 dots
    if form == "svg":
        assert 'width="234pt"' in first.decode() and "mmlu_$x^2$" in first.decode()
    if form == "pdf":
        assert first.startswith(b"%PDF") and re.search(rb"/MediaBox \[ ?0 0 234 158\.4 ?\]", first)


def test_runs_are_named_by_their_task_and_by_their_folder_where_tasks_are_the_same():
    first, second = report_material.run(), report_material.run()
    assert list(figures.by_task({"a/one": first, "b/two": second})) == ["one", "two"]
    assert list(figures.by_task({"a/one": first, "b/one": second})) == ["a/one", "b/one"]
    second.provenance["task"] = {"name": "other"}
    assert list(figures.by_task({"a/one": first, "b/one": second})) == ["task", "other"]


def test_a_figure_says_what_it_cannot_draw(draw, tmp_path):
    with pytest.raises(CorrSteerError, match=r"out must end with \.pdf, \.svg, \.png, got"):
        draw["correlation"](tmp_path / "figure.docx")
    bare = report_material.run()
    bare.snapshots = []
    with pytest.raises(CorrSteerError, match="run again holds no snapshots"):
        figures.correlation({"again": bare}, tmp_path / "figure.pdf")


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_command_draws_a_figure_of_runs(kind, monkeypatch, tmp_path):
    monkeypatch.setattr("corrsteer.runs.run.Run.load", lambda path: report_material.run())
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    report_material.steering().save(tmp_path / "one" / "s.safetensors")
    arguments = [str(tmp_path / name) for name in ("one", "two")]
    result = CliRunner().invoke(app, ["figure", kind, *arguments, "--out", str(tmp_path / "f.svg")])
    assert result.exit_code == 0, result.output
    assert ">one<" in (tmp_path / "f.svg").read_text(encoding="utf-8")
