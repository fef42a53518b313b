"""Trials whose graded completions are kept: what is stopped anywhere goes on to the same result."""

import dataclasses

import pytest
import tiny_pipeline
import torch

from corrsteer import CorrSteerError, Decoding, Trial, calibrate_scale, collect, evaluate, run_trials, select
from corrsteer.experiments.search import SearchOptions
from corrsteer.rollouts.journal import Journal

DECODING = Decoding(3, batch_size=16)


@pytest.fixture(scope="module")
def world():
    model, tokenizer, encoders = tiny_pipeline.model(), tiny_pipeline.tokenizer(), tiny_pipeline.encoders()
    run = collect(model, tokenizer, encoders, tiny_pipeline.task(40), decoding=DECODING, permutations=0, progress=False)
    return model, tokenizer, run, select(run, encoders=encoders)


class Stop(KeyboardInterrupt):
    pass


def counted(n, stop=None, seed=1):
    """A task, and how many completions its grader has seen; it is stopped at one of them."""
    seen = []

    def grader(completion, example):
        seen.append(1)
        if len(seen) == stop:
            raise Stop
        return tiny_pipeline.digits_up(completion, example)

    return tiny_pipeline.task(n, grader, seed), seen


def trials_of(steering):
    one, two = steering.alone()
    return [Trial(), Trial(one), Trial(two, 3.0), Trial(two, positions="all"), Trial(one, -2.0), Trial(two, 0.5)]


def journal(tmp_path):
    return Journal(tmp_path / "job", {"job": 1})


def test_trials_that_are_stopped_at_any_batch_come_to_the_same_and_make_none_twice(world, tmp_path):
    model, tokenizer, _, steering = world
    task, seen = counted(20)
    expected = run_trials(model, tokenizer, task, trials_of(steering), DECODING, progress=False)
    total = len(seen)
    with journal(tmp_path / "whole") as kept:
        found = run_trials(model, tokenizer, task, trials_of(steering), DECODING, journal=kept, progress=False)
    assert found == expected
    made = 0
    for stop in (5, 17, 18, 33, 40, 70, None):
        task, seen = counted(20, stop)
        with journal(tmp_path) as kept:
            try:
                found = run_trials(model, tokenizer, task, trials_of(steering), DECODING, journal=kept, progress=False)
            except Stop:
                made += 16 * ((len(seen) - 1) // 16)
                continue
    assert found == expected and all(one.seconds > 0 for one in found)
    assert total - made - 64 <= len(seen) < total


def test_what_is_done_is_not_done_again(world, tmp_path):
    model, tokenizer, _, steering = world
    for expected in (100, 0):
        task, seen = counted(20)
        with journal(tmp_path) as kept:
            run_trials(model, tokenizer, task, trials_of(steering)[:5], DECODING, journal=kept, progress=False)
        assert len(seen) == expected


def test_another_call_in_its_place_is_refused(world, tmp_path):
    model, tokenizer, _, steering = world
    task, _ = counted(20)
    with journal(tmp_path) as kept:
        run_trials(model, tokenizer, task, trials_of(steering), DECODING, journal=kept, progress=False)
    with journal(tmp_path) as kept, pytest.raises(CorrSteerError, match="holds other trials than are asked for here"):
        run_trials(model, tokenizer, task, trials_of(steering)[::-1], DECODING, journal=kept, progress=False)


def ways(world):
    """What is made of trials: name -> how, given a task and a journal, in what can be compared."""
    model, tokenizer, run, steering = world
    settings = {"decoding": DECODING, "progress": False}

    def searched(task, kept):
        options = SearchOptions(candidates=1, completions=600, confirm=0.5)
        of = {"model": model, "tokenizer": tokenizer, "validation": task, "options": options}
        found = select(run, "search", encoders=tiny_pipeline.encoders(), journal=kept, **of, **settings)
        return found.features, found.notes, found.provenance["search"]

    def pruned(task, kept):
        of = {"model": model, "tokenizer": tokenizer, "validation": task, "encoders": tiny_pipeline.encoders()}
        found = select(run, "pruned", journal=kept, **of, **settings)
        return found.features, found.notes, found.provenance["selection"]

    def calibrated(task, kept):
        return calibrate_scale(model, tokenizer, steering, task, journal=kept, **settings).provenance["calibration"]

    def evaluated(task, kept):
        found = evaluate(model, tokenizer, task, {"a": steering, "b": None}, journal=kept, **settings)
        return {name: dataclasses.replace(of, notes=[]) for name, of in found.items()}

    return {"search": searched, "pruned": pruned, "calibrate": calibrated, "evaluate": evaluated}


@pytest.mark.parametrize("way", ("search", "pruned", "calibrate", "evaluate"))
def test_what_is_made_of_trials_goes_on_to_the_same(world, tmp_path, way):
    make = ways(world)[way]
    task, seen = counted(64)
    expected = make(task, None)
    total = len(seen)
    for stop in (1, total // 3, total // 3, None):
        task, seen = counted(64, stop)
        with journal(tmp_path) as kept:
            if stop is None:
                assert make(task, kept) == expected
            else:
                with pytest.raises(Stop):
                    make(task, kept)
    assert len(seen) <= total / 2


def test_a_search_with_little_time_goes_on_as_it_would_have(world, tmp_path, monkeypatch):
    """Time is what the completions took that are kept, not what the clock says of a process that came later."""
    model, tokenizer, run, _ = world

    def searched(stop, kept):
        task, seen = counted(64, stop)
        of = {"model": model, "tokenizer": tokenizer, "validation": task, "encoders": tiny_pipeline.encoders()}
        options = SearchOptions(candidates=2, minutes=1e-4)
        return select(run, "search", journal=kept, options=options, decoding=DECODING, progress=False, **of)

    with journal(tmp_path) as kept:
        first = searched(None, kept)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1000"}.items():  # as many as go on, it is decided as it was
        monkeypatch.setenv(name, value)
    with journal(tmp_path) as kept:
        assert kept.processes == 1
        again = searched(None, kept)
    assert again.provenance["search"] == first.provenance["search"]
    assert any("the budget ended" in note for note in first.notes)
    assert torch.equal(again.directions, first.directions)
