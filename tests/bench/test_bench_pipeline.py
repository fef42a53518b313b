"""Whole jobs against the published way of working: both do the same, and a run that is cut off is continued."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from tiny_pipeline import model, task, tokenizer

from bench import pipeline, pipeline_worlds, published, record, stage_clock, table
from corrsteer import CorrSteerError
from corrsteer.lm.hook_points import decoder_layers
from corrsteer.ops import registry

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What a dry run writes."""
    folder = tmp_path_factory.mktemp("pipeline")
    command = [sys.executable, "-m", "bench.pipeline", "--dry-run", "--out", str(folder)]
    done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "pipeline-dry-run.json").read_text())


def test_both_ways_come_to_the_same_on_every_model(result):
    checks = [part for part in result["parts"] if part["job"] == "check"]
    assert [part["setting"] for part in checks] == [pipeline.SMOLLM2, pipeline.GEMMA]
    for part in checks:
        found = part["found"]
        assert all(found[name] for name in ("rewards", "features", "pruning", "evaluation"))
        assert found["completions"] == 2 * 8 and found["selected"] == 3 and found["r_beyond"] == 0
        assert 0.1 < found["reward"] < 0.9 and 0.001 < found["active"] < 0.02


def test_every_job_has_its_times_and_memory_by_each_way(result):
    jobs = pipeline.measured(result)
    assert len(jobs) == 2 * 2 * 3 and all(part["status"] == "measured" for part in jobs)
    for part in jobs:
        assert part["model_bytes"] > 0 and part["speedup"] > 0
        for way in part["ways"].values():
            assert len(way["seconds"]) == 2 and way["per_second"] > 0 and way["saes_bytes"] > 0
            assert way["call_bytes"] is None or way["call_bytes"] >= 0
    of = {(part["setting"], part["job"], part["new_tokens"]): part for part in jobs}
    pruned = of[pipeline.GEMMA, "pruning", 1]["ways"]
    assert {way: row["counted"] for way, row in pruned.items()} == {"corrsteer": 4 * 4, "published": 2 * 4}
    collected = of[pipeline.SMOLLM2, "collection", 3]
    assert collected["agreement"] == {"rewards": 16, "of": 16}


def test_the_time_of_collection_is_told_by_stage(result):
    for part in pipeline.measured(result):
        for label, way in part["ways"].items():
            assert ("stages" in way) == (part["job"] == "collection")
            if "stages" in way:
                assert set(way["stages"]) <= set(pipeline.STAGES)
                assert all(way["stages"][stage] > 0 for stage in pipeline.STAGES), (label, way["stages"])


def test_the_tables_hold_a_row_for_each_job(result):
    assert len(pipeline.speed_rows(result)) == len(pipeline.memory_rows(result)) == 12
    assert len(pipeline.share_rows(result)) == 4 * 3
    assert sum("both ways in float32: rewards the same" in line for line in pipeline.summary(result)) == 2


@pytest.fixture
def one_toy(monkeypatch):
    """The smallest form that has every part, of one model."""
    toy = copy.deepcopy(pipeline.GRIDS["toy"]) | {"settings": [pipeline.SMOLLM2], "rounds": 1}
    toy["jobs"] = {1: toy["jobs"][1]}
    monkeypatch.setitem(pipeline.GRIDS, "toy", toy)


def test_no_time_is_taken_where_the_ways_come_to_different_results(one_toy, monkeypatch, tmp_path):
    def mean(buffer, kept):
        return torch.stack([row[:n].mean(0) for row, n in zip(buffer, kept)])

    monkeypatch.setattr(published, "pool", mean)
    assert pipeline.main(["--dry-run", "--out", str(tmp_path)]) == 1
    checked, *jobs = json.loads((tmp_path / "pipeline-dry-run.json").read_text())["parts"]
    assert checked["status"] == "wrong" and checked["found"]["rewards"] and checked["found"]["r_beyond"] > 0.01
    assert {(part["status"], part["reason"]) for part in jobs} == {
        ("not measured", "the check did not hold, and no time is believed")
    }
    assert "ways" not in json.dumps(jobs)


def fake_parts(runs, dies=None):
    """Parts that note that they ran; one ends the process, as far as it can be told from within."""

    def part(job):
        def run():
            runs.append(job)
            if job == dies:
                raise SystemExit
            return {"status": "measured"}

        return pipeline.Part({"setting": "one", "job": job, "new_tokens": 1}, run)

    return [part(job) for job in ("check", "collection", "pruning")]


def fresh(parts):
    head = dict.fromkeys(("version", "sources", "packages", "python", "grid", "date", "commit", "dirty"), 1)
    return {
        **head,
        "device": {"type": "cpu"},
        "schema": "corrsteer.pipeline",
        "parts": [p.planned | {"status": "not measured"} for p in parts],
    }


def begun(folder, runs, dies=None):
    """A run that goes on with what is in the folder."""
    parts = fake_parts(runs, dies)
    result, path = fresh(parts), folder / "pipeline.json"
    if path.exists():
        pipeline.continued(result, path)
    pipeline.run_parts(result, parts, lambda: record.write_study(result, folder), 60)
    record.write_study(result, folder)
    return [part["status"] for part in result["parts"]]


def test_a_run_that_is_cut_off_is_continued_with_the_part_that_it_was_cut_off_in(tmp_path):
    runs = []
    with pytest.raises(SystemExit):
        begun(tmp_path, runs, dies="collection")
    assert begun(tmp_path, runs) == ["measured"] * 3
    assert runs == ["check", "collection", "collection", "pruning"]


def test_a_part_that_ends_the_process_twice_is_passed_over(tmp_path):
    runs = []
    for _ in range(2):
        with pytest.raises(SystemExit):
            begun(tmp_path, runs, dies="collection")
    assert begun(tmp_path, runs) == ["measured", "failed", "measured"]
    assert runs == ["check", "collection", "collection", "pruning"]


def test_a_result_of_other_sources_is_not_continued(tmp_path):
    begun(tmp_path, [])
    with pytest.raises(CorrSteerError, match="one of other sources; give another folder, or --again"):
        pipeline.continued(fresh(fake_parts([])) | {"sources": 2}, tmp_path / "pipeline.json")


def test_no_part_is_begun_once_the_time_is_used_up(tmp_path):
    runs = []
    parts = fake_parts(runs)
    result = fresh(parts)
    pipeline.run_parts(result, parts, lambda: None, 0)
    assert runs == [] and {part["reason"] for part in result["parts"]} == {"the time was used up"}


class Work:
    """Takes time by a clock of its own."""

    now = 0.0

    def outer(self):
        Work.now += 1
        self.inner()
        Work.now += 2

    def inner(self):
        Work.now += 10


def test_time_belongs_to_the_innermost_stage(monkeypatch):
    clock = stage_clock.StageClock(CPU)
    monkeypatch.setattr(clock, "_now", lambda: Work.now)
    before = registry.registered()
    with clock.watching([(Work, "outer", "a"), (Work, "inner", "b")]):
        assert [backend.name for backend in registry.registered()] == [backend.name for backend in before]
        Work.now += 100
        Work().outer()
        Work().inner()
    assert clock.seconds == {"rest": 100, "a": 3, "b": 20}
    assert registry.registered() == before and Work.outer.__name__ == "outer" and not hasattr(Work.outer, "__wrapped__")


def test_the_published_pooling_looks_at_kept_steps_alone():
    buffer = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [9.0, 9.0]], [[0.0, 2.0], [9.0, 9.0], [9.0, 9.0]]])
    assert published.pool(buffer, [2, 1]).tolist() == [[3, 0], [0, 2]]


def test_the_published_steering_adds_the_features_direction_to_the_last_position():
    lm, g = model(), torch.Generator().manual_seed(0)
    sae = published.Sae(*(torch.randn(s, generator=g) for s in ((128, 6), (6,), (6,), (6, 128))))
    chosen = [published.Chosen(1, 4, 2.5)]
    seen, blocks = {}, decoder_layers(lm)[1]

    def outputs(name):
        ids = torch.tensor([tokenizer()("12+34=")["input_ids"]])
        hook = blocks[1].register_forward_hook(lambda _m, _a, out: seen.update({name: out}))
        with torch.no_grad():
            lm(ids)
        hook.remove()

    outputs("before")
    with published.steered(lm, {1: sae}, chosen):
        outputs("after")
    moved = (seen["after"] - seen["before"])[0]
    torch.testing.assert_close(moved[-1], 2.5 * sae.W_dec[4], rtol=1e-4, atol=1e-4)
    assert bool((moved[:-1] == 0).all())
    assert not blocks[1]._forward_hooks


def test_the_published_correlation_is_pearsons():
    lm, samples = model(), task(12)
    g = torch.Generator().manual_seed(0)
    sae = published.Sae(*(torch.randn(s, generator=g) for s in ((128, 6), (6,), (6,), (6, 128))))
    found = published.collect(lm, tokenizer(), {1: sae}, samples, 2, batch=5)
    rows = []
    for at in range(len(samples)):
        one = published.collect(lm, tokenizer(), {1: sae}, samples.__class__(**vars(samples) | {
            "examples": samples.examples[at : at + 1]}), 2)  # fmt: skip
        assert one.completions == found.completions[at : at + 1]
        rows.append(one.sums[1].z)
    expected = torch.corrcoef(torch.stack([torch.tensor(found.rewards).double(), *torch.stack(rows).T]))[0, 1:]
    torch.testing.assert_close(found.correlation(1), expected.nan_to_num(0), rtol=1e-5, atol=1e-5)


def test_the_reward_is_a_bit_of_the_prompt_and_the_first_word():
    def rewards(completion, examples):
        return [pipeline_worlds.first_word_bit(completion.format(at), example) for at, example in enumerate(examples)]

    examples = task(100).examples
    assert not any(rewards("", examples))
    for varied in (rewards("{}", examples[:1] * 100), rewards("one", examples)):
        assert 30 < sum(varied) < 70
    assert rewards(" {} and so on", examples) == rewards("{}\nor else", examples)


def test_the_committed_result_is_believed_and_is_what_the_page_says():
    committed = json.loads((record.STUDIES / "pipeline.json").read_text())
    assert (committed["schema"], committed["version"]) == ("corrsteer.pipeline", record.VERSION)
    assert (committed["device"]["type"], committed["device"]["threads"]) == ("cpu", 1)
    checked, *jobs = committed["parts"]
    assert checked["status"] == "measured" and checked["found"]["r_beyond"] == 0
    assert {part["status"] for part in jobs} <= {"measured", "not measured"} and pipeline.measured(committed)
    assert all(line in table.pipeline(record.STUDIES) for line in pipeline.summary(committed))
