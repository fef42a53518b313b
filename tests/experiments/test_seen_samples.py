"""Which samples a steering has seen, and results that are of another task than they are used for."""

import dataclasses
import json

import pytest
import tiny_pipeline
import torch

from corrsteer import CorrSteerError, Decoding, Run, Steering, Task, calibrate_scale, collect, evaluate, select
from corrsteer.rollouts.grading import grade
from corrsteer.runs.collect import CollectionStopped

DECODING = Decoding(max_new_tokens=2, batch_size=8)
QUIET = {"decoding": DECODING, "progress": False}


@pytest.fixture(scope="module")
def world():
    return tiny_pipeline.model(), tiny_pipeline.tokenizer()


@pytest.fixture(scope="module")
def task():
    rows = [{"prompt": f"{n}+{n * 7}=", "answer": "1"} for n in range(50)]
    return Task.from_rows(rows, grader=tiny_pipeline.digits_up, name="doubles")


@pytest.fixture(scope="module")
def steering(world, task):
    return select(collect(*world, tiny_pipeline.encoders(), task.split()[0], permutations=0, **QUIET))


def hashes(entry):
    return {entry["prompt_hashes"][at : at + 8] for at in range(0, len(entry["prompt_hashes"]), 8)}


def test_a_steering_knows_what_it_was_selected_and_validated_on_after_saving_too(world, task, steering, tmp_path):
    train, validation, _ = task.split()
    (selected,) = steering.provenance["selected_on"]
    assert selected == train.samples()
    assert (selected["task"], selected["part"], selected["n"]) == ("doubles", "train", 40)
    assert "validated_on" not in steering.provenance and "samples" not in steering.provenance
    scaled = calibrate_scale(*world, steering, validation, scales=(1,), **QUIET)
    scaled.save(tmp_path / "s")
    provenance = Steering.load(tmp_path / "s").provenance
    assert provenance["selected_on"] == [selected] and provenance["validated_on"] == [validation.samples()]
    assert not any("among those" in note for note in scaled.notes)


def test_pruning_is_a_validation(world, task):
    train, validation, _ = task.split()
    run = collect(*world, tiny_pipeline.encoders(), train, permutations=0, **QUIET)
    settings = {"model": world[0], "tokenizer": world[1], **QUIET}
    pruned = select(run, "pruned", validation=validation, **settings)
    assert pruned.provenance["validated_on"] == [validation.samples()]
    assert not any("among those" in note for note in pruned.notes)
    on_train = select(run, "pruned", validation=train, **settings)
    assert any("40 of the 40 samples of 'doubles' (train) are among those that features" in n for n in on_train.notes)


def test_evaluating_on_samples_that_were_seen_says_so_and_on_others_says_nothing(world, task, steering):
    train, validation, test = task.split()
    scaled = calibrate_scale(*world, steering, validation, scales=(1,), **QUIET)
    assert evaluate(*world, test, scaled, **QUIET).notes == []
    selected_on, validated_on = evaluate(*world, task, scaled, **QUIET).notes
    assert selected_on == (
        "40 of the 50 samples of 'doubles' (all) are among those that features were selected on, so the score "
        "flatters; take samples that were left out of those"
    )
    assert validated_on.startswith("5 of the 50 samples of 'doubles' (all) are among those that the steering was valid")
    other = task.split(seed=1)[2]
    seen = len({e.prompt for e in other.examples} & {e.prompt for e in train.examples})
    (note,) = evaluate(*world, other, steering, **QUIET).notes
    assert seen > 0 and note.startswith(f"{seen} of the 5 samples of 'doubles' (test)")
    again = Task.from_rows([{"prompt": e.prompt, "answer": "2"} for e in train.examples], name="given again")
    (note,) = evaluate(*world, again, steering, **QUIET).notes
    assert note.startswith("40 of the 40 samples of 'given again' (all) are among those that features were selected on")
    assert evaluate(*world, task, None, **QUIET).notes == [] and json.dumps(
        evaluate(*world, again.take(2), steering, **QUIET).to_dict()["notes"]
    ).startswith('["2 of the 2')


def test_calibrating_on_what_features_were_selected_on_is_noted(world, task, steering):
    scaled = calibrate_scale(*world, steering, task.split()[0].take(3), scales=(1,), **QUIET)
    assert any(n.startswith("3 of the 3 samples of 'doubles' (train) are among those that feat") for n in scaled.notes)


def test_a_collection_that_stopped_saw_the_samples_that_were_graded(world, task, tmp_path):
    graded = []

    def grader(completion, example):
        graded.append(example.prompt)
        return float("nan") if len(graded) == 20 else float(len(graded) % 2)

    with pytest.raises(CollectionStopped) as stopped:
        collect(*world, tiny_pipeline.encoders(), task.graded_by(grader), permutations=0, **QUIET)
    stopped.value.run.save(tmp_path)
    samples = Run.load(tmp_path).provenance["samples"]
    assert samples["n"] == 16
    expected = dataclasses.replace(task, examples=tuple(e for e in task.examples if e.prompt in graded[:16]))
    assert hashes(samples) == hashes(expected.samples())


def test_a_record_of_many_samples_stays_small_and_tells_each():
    rows = [{"prompt": f"question {n // 2}", "answer": "1"} for n in range(40_000)]
    record = Task.from_rows(rows).samples()
    assert len(json.dumps(record)) < 170_000 and len(hashes(record)) == 20_000, "8 characters a distinct prompt"


CHANGED = {
    "a part": (lambda t: t.split()[2], {}, "its number of samples is 50, not 5"),
    "another order": (
        lambda t: dataclasses.replace(t, examples=t.examples[::-1]), {},
        r"its prompts or answers are those of 'doubles' \(all\), not 'doubles' \(all\)",
    ),
    "other answers": (
        lambda t: dataclasses.replace(t, examples=tuple(dataclasses.replace(e, answer="2") for e in t.examples)), {},
        "its prompts or answers are those of",
    ),
    "another grader": (lambda t: Task.from_rows([{"prompt": e.prompt, "answer": "1"} for e in t.examples]), {},
                       "its grader is tiny_pipeline:digits_up, not exact; grade this task"),
    "other decoding": (lambda t: t, {"decoding": Decoding(3, temperature=0.5, batch_size=8)},
                       "its max_new_tokens is 2, not 3, its temperature is 0.0, not 0.5; grade this task"),
    "no decoding": (lambda t: t, {"decoding": None}, "its max_new_tokens is 2, not 32"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_unsteered_results_of_something_else_are_refused_with_what_differs(name, world, task, steering, monkeypatch):
    before = grade(*world, task, DECODING, progress=False)
    change, options, message = CHANGED[name]
    monkeypatch.setattr("corrsteer.experiments.evaluation.run_trials", lambda *_, **__: pytest.fail("generated"))
    with pytest.raises(CorrSteerError, match=f"^unsteered must be graded on the same task .*{message}"):
        evaluate(*world, change(task), steering, unsteered=before, **QUIET | options)


def test_unsteered_results_of_the_same_task_serve_every_steering(world, task, steering):
    before = grade(*world, task.split()[2], DECODING, progress=False)
    assert before.task == task.split()[2].identity and before.task.part == "test" and before.decoding == DECODING
    once = evaluate(*world, task.split()[2], steering, unsteered=before, **QUIET)
    assert once == evaluate(*world, task.split()[2], steering, **QUIET)
    assert torch.tensor(before.rewards).mean() == pytest.approx(once.unsteered)


def test_a_part_of_a_part_says_so(task):
    train, validation, test = task.split()
    assert [t.part for t in (task, train, validation, test)] == ["all", "train", "validation", "test"]
    assert train.split()[1].part == "train/validation" and train.take(3).part == "train"
