"""What a report shows, as data, and that every text of it is escaped."""

import json
import re
import shlex
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import report_material
import torch
import typer
from typer.testing import CliRunner

from corrsteer import Moments
from corrsteer.cli import app
from corrsteer.errors import CorrSteerError
from corrsteer.files import to_json
from corrsteer.report.chance import largest_by_chance
from corrsteer.report.page import features
from corrsteer.report.page.blocks import Fold, Missing, Plot, Sample, Table
from corrsteer.report.page.collection import collect_command, select_command
from corrsteer.report.page.document import contents, page
from corrsteer.report.page.found import Compared, Material, find
from corrsteer.report.page.markup import Markup, embedded
from corrsteer.report.page.outcome import difference_of
from corrsteer.runs.peaks import Extreme

IDS = ["scores", "changes", "side-effects", "runs", "features", "top-features", "progress", "search", "distributions",
       "cost", "provenance", "notes"]  # fmt: skip


def everything(blocks, kind):
    """Blocks of a kind, in folds too."""
    for block in blocks:
        if isinstance(block, kind):
            yield block
        if isinstance(block, Fold):
            yield from everything(block.blocks, kind)


def of_section(material, name, kind):
    (section,) = (one for one in contents(material)[1] if one.id == name)
    return list(everything(section.blocks, kind))


def marked(parts):
    return "".join(f"[{part.text}]" if part.marked else part.text for part in parts)


def test_the_sentence_says_what_was_steered_what_that_did_and_whether_chance_explains_it():
    sentence, sections = contents(report_material.material())
    assert sentence == (
        "Steering by search along layer 1 feature 3, at scale 1, raised the mean reward of 40 samples from 0.400 to "
        "0.700, a difference of +0.300 (95 % interval +0.100 to +0.500); chance alone does not explain that (p = "
        "0.006, adjusted to all 2 that were compared)."
    )
    assert [section.id for section in sections] == IDS


def test_the_sentence_is_never_about_a_baseline():
    compared = Compared({"other": report_material.evaluation()}, {"other": {}})
    material = report_material.material()
    sentence, _ = contents(Material(material.runs, {}, {"e.json": compared}))
    assert sentence.startswith("Of 128 features, ") and "nothing was steered" in sentence


def test_what_the_inputs_do_not_hold_is_left_out_with_the_command_that_gives_it():
    run = report_material.run(kept=False)
    run.snapshots, run.rollouts = [], []
    material = Material({"run": run})
    expected = {
        "scores": "corrsteer evaluate", "changes": "corrsteer evaluate", "side-effects": "corrsteer evaluate",
        "top-features": "--keep-activations always", "progress": "corrsteer collect",
        "distributions": "corrsteer collect",
        "search": "--strategy search", "provenance": "corrsteer select",
    }  # fmt: skip
    for name, command in expected.items():
        assert any(command in block.command for block in of_section(material, name, Missing)), name


@pytest.mark.parametrize("before, after, expected", [
    ("the sum is 12", "the sum is 22", ("the sum is [1]2", "the sum is [2]2")),
    ("same", "same", ("same", "same")),
    ("", "new", ("", "[new]")),
    ("aaa", "aa", ("aa[a]", "aa")),
    ("cafe", "cafe\u0301", ("caf[e]", "caf[e\u0301]")),
    ("a\u0301x", "a\u0300x", ("[a\u0301]x", "[a\u0300]x")),
])  # fmt: skip
def test_what_differs_between_two_texts_is_marked_and_no_character_is_cut(before, after, expected):
    assert tuple(map(marked, difference_of(before, after))) == expected


def test_the_chance_bound_divides_features_as_single_step_p_values_do():
    run = report_material.run(permutations=199)
    bound, how = largest_by_chance(run)
    assert how == "199 permutations"
    r = torch.cat([run.correlation(layer) for layer in run.points]).abs()
    p = torch.cat([of_layer.p_adjusted for of_layer in run.significance().values()])
    assert bool((p[r > bound] <= 0.05).all()), "step-down p-values are no larger than those of a single step"
    assert float(r[p <= 0.05].min()) > 0.5 * bound


def test_without_permutations_the_chance_bound_is_that_of_normal_correlations():
    run = report_material.run(permutations=0)
    bound, how = largest_by_chance(run)
    assert how == "a normal approximation" and 0.2 < bound < 0.35  # the normal quantile of 128 features and 200 samples


def test_survivors_are_points_and_all_other_features_are_counted_in_the_density():
    material = report_material.material()
    (run,) = material.runs.values()
    (plot,) = of_section(material, "features", Plot)
    assert [variant.label for variant in plot.variants] == ["all layers", "layer 1", "layer 2"]
    heat, survivors, steered = plot.variants[0].traces
    active = sum(int((m["max"].frequency() > 0).sum()) for m in run.moments.values())
    assert sum(round(10**z) for row in heat["z"] for z in row if z is not None) == active
    assert survivors["text"][0].startswith("layer ") and "feature 3: r +" in survivors["text"][0]
    assert steered["name"] == "steered along" and len(steered["x"]) == 1
    assert features.survey(run).survivors[0][1] == 3


def test_top_features_link_to_neuronpedia_where_the_sae_names_its_page_and_to_nothing_else():
    material = report_material.material()
    (table,) = of_section(material, "top-features", Table)
    assert table.rows[0][0].href == "https://www.neuronpedia.org/gemma-2-2b/20-res/3"
    (run,) = material.runs.values()
    for named in ("javascript:alert(1)", "a/b/c", "../x?y", ""):
        run.provenance["saes"]["1"]["metadata"]["neuronpedia_id"] = named
        assert features.link(run, 1, 3) is None


def test_every_plot_has_a_statement_in_words_and_its_numbers_as_a_table():
    _, sections = contents(report_material.material())
    plots = [plot for section in sections for plot in everything(section.blocks, Plot)]
    assert len(plots) >= 7
    for plot in plots:
        assert plot.alternative.endswith(".") and len(plot.alternative) > 20 and plot.table.rows, plot.title
        assert all(len(row) == len(plot.table.header) for row in plot.table.rows)


class Tags(HTMLParser):
    """Elements and attributes of a page."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def parsed(text):
    tags = Tags()
    tags.feed(text)
    return tags.found


def test_markup_in_prompts_completions_names_and_paths_is_text_wherever_it_stands():
    plain, hostile = (parsed(page(report_material.material(label), title=label("title")))
                      for label in (str, report_material.hostile))  # fmt: skip
    assert {tag for tag, _ in hostile} == {tag for tag, _ in plain} | {"details", "summary"}
    assert not any(tag == "img" or name.startswith("on") for tag, names in hostile for name in names)


def test_json_in_a_script_element_cannot_end_it():
    text = embedded({"</script>": "<!--<script>\u2028&", "n": float("nan")})
    assert not re.search("[<>&\u2028]", text) and json.loads(text) == {"</script>": "<!--<script>\u2028&", "n": "nan"}


def test_half_of_a_surrogate_pair_in_a_path_becomes_a_question_mark(tmp_path):
    material = report_material.material(lambda text: text)
    (run,) = material.runs.values()
    assert "run\\udcff" not in page(Material({"run\udcff": run})).encode().decode()


def test_the_policy_of_a_page_allows_its_two_scripts_by_their_hash_and_nothing_from_anywhere():
    (policy,) = (a["content"] for tag, a in parsed(page(report_material.material())) if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and policy.count("sha256-") == 2
    assert (
        "unsafe-eval" not in policy and "http" not in policy and "'unsafe-inline'" not in policy.split("style-src")[0]
    )


def test_steerings_and_evaluations_in_a_runs_directory_are_found_and_other_files_passed_over(tmp_path, monkeypatch):
    directory = tmp_path / "run"
    directory.mkdir()
    report_material.steering().save(directory / "search.safetensors")
    report_material.steering().save(tmp_path / "elsewhere.safetensors")
    evaluated = {"format": "corrsteer.evaluations/1", "begun": {},
                 "steerings": {"search.safetensors": report_material.evaluation().to_dict()}}  # fmt: skip
    (directory / "e.json").write_text(to_json(evaluated))
    (directory / "settings.json").write_text('{"mine": 1}')
    monkeypatch.setattr("corrsteer.report.page.found.Run.load", lambda path: report_material.run())
    found = find([directory], [tmp_path / "elsewhere.safetensors"])
    assert [str(path) for path in found.steerings] == [
        str(tmp_path / "elsewhere.safetensors"), str(directory / "search.safetensors")
    ]  # fmt: skip
    assert list(found.compared) == [str(directory / "e.json")]
    (compared,) = found.compared.values()
    assert compared.evaluations["search.safetensors"] == report_material.evaluation()
    with pytest.raises(CorrSteerError, match="evaluation must be a file that `corrsteer evaluate --out` wrote"):
        find([directory], evaluations=[directory / "settings.json"])


def test_without_plotly_a_report_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(CorrSteerError, match=r"pip install 'corrsteer\[report\]'"):
        page(report_material.material())


def test_the_command_writes_a_page_and_says_of_what(monkeypatch, tmp_path):
    monkeypatch.setattr("corrsteer.report.page.found.Run.load", lambda path: report_material.run())
    (tmp_path / "run").mkdir()
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--out", str(tmp_path / "r.html"), "--json"])
    said = json.loads(result.stdout)
    assert result.exit_code == 0 and said["runs"] == [str(tmp_path / "run")] and said["steerings"] == []
    assert (tmp_path / "r.html").stat().st_size == said["bytes"] < 10e6


def test_every_command_that_a_page_names_exists_with_its_options():
    commands = typer.main.get_command(app).commands
    run = report_material.run(kept=False)
    run.snapshots, run.rollouts = [], []
    of_both = [contents(Material({"run": run}))[1], contents(report_material.material())[1]]
    named = {m.command for sections in of_both for section in sections for m in everything(section.blocks, Missing)}
    assert len(named) > 5
    for command in named:
        program, name, *words = command.split()
        options = {option for p in commands[name].params for option in p.opts}
        assert program == "corrsteer" and {word for word in words if word.startswith("--")} <= options, command


def test_the_commands_that_made_a_run_and_a_steering_can_be_given_again():
    settings = {"model": "m m", "task": "t.jsonl", "grader": ["exact", "number"], "within_prompt": False, "chat": True,
                "system": None}  # fmt: skip
    saes = {"1": {"source": {"kind": "directory", "directory": "sae"}},
            "2": {"source": {"kind": "release", "release": "r", "sae_id": "a/b"}},
            "3": {"source": {"kind": "identity", "d_in": 4}}}  # fmt: skip
    collected = collect_command({"settings": settings, "saes": saes})
    assert collected == (
        "corrsteer collect --out RUN --sae 1=sae --sae 2=r:a/b --sae 3=identity --model 'm m' --task t.jsonl "
        "--grader exact --grader number --chat"
    )
    chosen = {"strategy": "all", "score": "pearson", "alpha": None, "top_k": 10, "layers": [1, 3]}
    selected = select_command("s.safetensors", {"selection": chosen, "reward": "exact", "first_samples": 50})
    assert selected == (
        "corrsteer select RUN --out s.safetensors --strategy all --score pearson --top-k 10 --layer 1 --layer 3 "
        "--reward exact --samples 50"
    )
    commands = typer.main.get_command(app).commands
    for line in (collected, selected):
        _, name, *words = shlex.split(line)
        commands[name].make_context(name, words)  # which reads and checks all options, and runs nothing


@pytest.mark.parametrize(
    "changed",
    (
        {"settings": {"model": "m", "task": None, "grader": ["exact"]}},  # of rollouts
        {"settings": {"model": "m", "task": "t.jsonl", "grader": ["none"]}},  # of rewards from elsewhere
        {"saes": {"1": {"source": {"kind": "memory"}}}},
        {"settings": {}},
    ),
)
def test_a_run_that_no_command_makes_has_none(changed):
    described = {"settings": {"model": "m", "task": "t.jsonl", "grader": ["exact"]}, "saes": {}}
    assert collect_command(described) is not None and collect_command(described | changed) is None


def test_tokens_are_coloured_by_their_share_of_the_largest_activation_which_is_marked():
    one = Extreme(0, 2.0, None, tokens=(("1", None), ("+", 0.5), ("<b>", 2.0), ("=", 0.0), ("x", -1.0)))
    parts = features.coloured(one)
    assert [(p.text, p.marked, p.strength) for p in parts] == [
        ("1", False, 0.0), ("+", False, 0.25), ("<b>", True, 1.0), ("=", False, 0.0), ("x", False, 0.0)
    ]  # fmt: skip
    shown = Markup().block(Sample("heading", [("As read", parts)]))
    assert '<span class="token" style="--share: 1.00"><mark>&lt;b&gt;</mark></span>' in shown


def test_with_a_model_completions_are_read_again():
    material, asked = report_material.material(), []

    def read(run, layer, index, found):
        asked.append((layer, index))
        return [replace(one, tokens=(("read again", 1.0),)) for one in found]

    of_page = page(replace(material, read_again=read))
    assert (1, 3) in asked and "read again" in of_page and "--tokens" not in of_page
    assert "report RUN --tokens" in page(material)


def test_a_run_that_was_stopped_before_its_first_sample_has_a_page():
    run = report_material.run(kept=False)
    run.moments, run.evidence, run.snapshots = {1: {"max": Moments(64)}}, {}, []
    run.points = {1: run.points[1]}
    run.rewards, run.rollouts = torch.full_like(run.rewards, torch.nan), [None] * len(run.rewards)
    sentence, sections = contents(Material({"run": run}))
    assert sentence.startswith("Of 64 features, 0 correlate with the reward of 0 samples")
    shown = re.sub("<script>.*?</script>", "", page(Material({"run": run})), flags=re.DOTALL)
    assert not re.search(r"\bnan\b", shown)


def test_several_runs_stand_side_by_side():
    runs = {"one": report_material.run(), "two": report_material.run(seed=1, layers=3)}
    (table,) = of_section(Material(runs), "runs", Table)
    assert [(row[0].text, row[5].text) for row in table.rows] == [("one", "128"), ("two", "192")]
    assert len(of_section(Material(runs), "features", Plot)) == len(of_section(Material(runs), "progress", Plot)) == 2
