"""The paper's figures: what they draw, and files that a two-column page takes."""

import re

import pytest
import report_material
from PIL import Image
from typer.testing import CliRunner

from corrsteer.cli import app
from corrsteer.errors import CorrSteerError
from corrsteer.report import figures
from corrsteer.stats.stability import Leader, Snapshot
from corrsteer.steering.features import Feature

DRAW = {"progress": figures.progress, "frequency": figures.frequency}


@pytest.fixture(scope="module")
def runs():
    return {name: report_material.run(seed=at) for at, name in enumerate(("mmlu_$x^2$", "<gsm8k>"))}


def test_progress_is_the_highest_r_of_any_layer_after_each_count_of_samples():
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


@pytest.mark.parametrize("kind", DRAW)
@pytest.mark.parametrize("form", figures.FORMATS)
def test_a_figure_is_as_wide_as_a_column_and_the_same_bytes_each_time(kind, form, runs, tmp_path):
    paths = [tmp_path / f"{at}.{form}" for at in range(2)]
    for path in paths:
        DRAW[kind](runs, path)
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


def test_a_figure_says_what_it_cannot_draw(runs, tmp_path):
    with pytest.raises(CorrSteerError, match=r"out must end with \.pdf, \.svg, \.png, got"):
        figures.progress(runs, tmp_path / "figure.docx")
    bare = report_material.run()
    bare.snapshots = []
    with pytest.raises(CorrSteerError, match="run again holds no snapshots"):
        figures.progress({"again": bare}, tmp_path / "figure.pdf")


@pytest.mark.parametrize("kind", DRAW)
def test_the_command_draws_a_figure_of_runs(kind, monkeypatch, tmp_path):
    monkeypatch.setattr("corrsteer.runs.run.Run.load", lambda path: report_material.run())
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    report_material.steering().save(tmp_path / "one" / "s.safetensors")
    arguments = [str(tmp_path / name) for name in ("one", "two")]
    result = CliRunner().invoke(app, ["figure", kind, *arguments, "--out", str(tmp_path / "f.svg")])
    assert result.exit_code == 0, result.output
    assert ">one<" in (tmp_path / "f.svg").read_text(encoding="utf-8")
