"""Saving a run: whatever happens, the old run or the new one is there whole, and a user's own files are left alone."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import tiny_pipeline
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from corrsteer import CorrSteerError, Decoding, Run, Steering, collect, select

OURS = {"layer_10.safetensors", "layer_1.max.2.safetensors", "notes.txt", "layer_7.max.safetensors", ".writable",
        "layer_1.sum.residuals.safetensors"}  # fmt: skip


@pytest.fixture(scope="module")
def world():
    return tiny_pipeline.model(), tiny_pipeline.tokenizer()


def gather(world, n, **options):
    encoders = tiny_pipeline.encoders((1,), d_sae=16)
    options = {"decoding": Decoding(2), "permutations": 19, "progress": False} | options
    return collect(*world, encoders, tiny_pipeline.task(n), **options)


@pytest.fixture(scope="module")
def old(world):
    return gather(world, 6)


@pytest.fixture(scope="module")
def new(world):
    return gather(world, 9, coefficient_pool="mean")


@pytest.fixture
def directory(tmp_path, old):
    """A folder with a run, and files of the user's whose names are much like a run's."""
    for name in OURS:
        (tmp_path / name).write_text(f"the user's {name}")
    old.save(tmp_path)
    return tmp_path


def same(a, b):
    """Whether two runs hold the same."""
    states = [[(m.STATE, *(getattr(m, s).tolist() for s in m.STATE)) for by in (r.moments, r.evidence, r.residuals)
               for of in by.values() for m in of.values()] for r in (a, b)]  # fmt: skip
    parts = [(r.points, r.pool, r.notes, r.snapshots, r.provenance, r.rewards.tolist()) for r in (a, b)]
    return states[0] == states[1] and parts[0] == parts[1]


def theirs(directory):
    return {path.name for path in directory.iterdir()} - OURS


def untouched(directory):
    return all((directory / name).read_text() == f"the user's {name}" for name in OURS)


def test_a_run_replaces_the_one_that_was_there_and_leaves_other_files_alone(directory, old, new):
    assert same(Run.load(directory), old) and len(theirs(directory)) == 2 + 2 + 2 + 4
    for run, number in ((new, 3 + 3 + 2 + 4), (old, 10), (new, 12), (new, 12)):
        run.save(directory)
        assert same(Run.load(directory), run) and len(theirs(directory)) == number and untouched(directory)


def test_files_that_no_run_may_have_are_neither_read_nor_removed(directory, new):
    (directory.parent / "precious.safetensors").write_text("kept")
    described = json.loads((directory / "run.json").read_text())
    for name in ("../precious.safetensors", "notes.txt", "layer_10.safetensors"):
        (directory / "run.json").write_text(json.dumps(described | {"rewards": name}))
        with pytest.raises(CorrSteerError, match="is damaged .it names files that are not a run's"):
            Run.load(directory)
        new.save(directory)
        assert untouched(directory) and (directory.parent / "precious.safetensors").exists()


@pytest.mark.parametrize("text", ("{", "[]", '{"format": "corrsteer.run/1"}', "\xff"))
def test_a_run_of_another_version_or_damaged_is_refused_and_can_be_replaced(directory, new, text):
    (directory / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(CorrSteerError, match="is damaged|is not a run of this version"):
        Run.load(directory)
    new.save(directory)
    assert same(Run.load(directory), new) and untouched(directory)


STEPS = ("os.open", "os.fsync", "os.replace", "os.unlink", "os.chmod", "save")


class Steps:
    """What saving does, step by step, until something happens at one of them: before it, or after half of it."""

    def __init__(self, monkeypatch, at, happens):
        self.count, self.at, self.happens = 0, at, happens
        for step in STEPS[:-1]:
            function = getattr(os, step.split(".")[1])
            monkeypatch.setattr(step, lambda *a, function=function, **k: self.step(lambda: function(*a, **k)))
        monkeypatch.setattr("safetensors.torch.save_file", self.save)

    def step(self, act):
        self.count += 1
        if self.count == self.at:
            self.happens()
        return act()

    def save(self, tensors, path, metadata):
        self.step(lambda: save_file(tensors, path, metadata=metadata))
        if self.count == self.at - 1:  # half a file
            os.truncate(path, os.path.getsize(path) // 2)


def steps_of(run, directory, monkeypatch):
    with monkeypatch.context() as patched:
        steps = Steps(patched, 0, None)
        run.save(directory)
    return steps.count


def test_a_process_killed_at_any_step_of_saving_leaves_the_old_run_or_the_new_one_whole(
    directory, old, new, monkeypatch
):
    total, found = steps_of(new, directory, monkeypatch), []
    for at in range(1, total + 1):
        old.save(directory)
        child = os.fork()
        if child == 0:  # a kill runs no cleanup, as this runs none
            Steps(monkeypatch, at, lambda: os._exit(9))
            new.save(directory)
            os._exit(0)
        assert os.waitpid(child, 0)[1] >> 8 == 9, at
        run = Run.load(directory)
        found.append(same(run, new))
        assert found[-1] or same(run, old), at
        assert untouched(directory), at
        new.save(directory)
        assert same(Run.load(directory), new) and untouched(directory), at
    assert found == sorted(found) and {False, True} == set(found), "old until one step, and new from there on"


class Cut(BaseException):
    """What no handler expects."""


@pytest.mark.parametrize("error", (OSError(28, "No space left on device"), KeyboardInterrupt(), Cut()), ids=repr)
def test_an_error_at_any_step_leaves_one_run_whole_and_nothing_half_written(directory, old, new, monkeypatch, error):
    total = steps_of(new, directory, monkeypatch)

    def happens():
        raise error

    for at in range(1, total + 1):
        old.save(directory)
        before = theirs(directory)
        with monkeypatch.context() as patched:
            Steps(patched, at, happens)
            try:
                new.save(directory)
            except (CorrSteerError, KeyboardInterrupt, Cut):
                pass
        run = Run.load(directory)
        assert same(run, old) or same(run, new), at
        if same(run, old):
            assert theirs(directory) == before, at
        assert untouched(directory), at


def test_a_file_system_that_takes_no_more_leaves_the_old_run_and_says_why(directory, old, new):
    resource = pytest.importorskip("resource")
    before, (soft, hard) = theirs(directory), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # bytes, which the evidence alone is too large for
    try:
        with pytest.raises(CorrSteerError, match="cannot be written .*File too large"):
            new.save(directory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(Run.load(directory), old) and theirs(directory) == before and untouched(directory)


def test_a_run_saved_through_a_link_or_onto_a_link_stays_where_the_links_lead(tmp_path, old, new):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    old.save(tmp_path / "link")
    new.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and same(Run.load(tmp_path / "real"), new)


def test_what_json_cannot_hold_is_known_when_an_encoder_is_made_and_no_save_fails_of_it(world, tmp_path):
    odd = {"dtype": torch.float16, "tags": {"b", "a"}, "path": Path("x/y"), "norm": torch.tensor([1.0, float("nan")])}
    made = {1: dataclasses.replace(tiny_pipeline.encoders((1,), d_sae=16)[1], metadata=odd)}
    expected = {"dtype": "torch.float16", "tags": ["a", "b"], "path": "x/y", "norm": [1.0, "nan"]}
    assert made[1].metadata == expected
    run = collect(*world, made, tiny_pipeline.task(6), decoding=Decoding(2), permutations=0, progress=False)
    run.provenance["mine"] = {"loss": float("nan"), "when": Path("a")}
    run.save(tmp_path / "run")
    text = (tmp_path / "run" / "run.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    loaded = Run.load(tmp_path / "run")
    assert loaded.provenance["saes"]["1"]["metadata"] == expected
    assert loaded.provenance["mine"] == {"loss": "nan", "when": "a"}
    steering = select(run)
    steering.save(tmp_path / "s")
    assert Steering.load(tmp_path / "s").provenance["mine"] == {"loss": "nan", "when": "a"}


def damage_features(path):
    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        described = file.metadata()
    tensors["1.max.features"] = torch.full_like(tensors["1.max.features"].to(torch.int32), 16).to(torch.uint16)
    save_file(tensors, str(path), metadata=described)


DAMAGED = {
    "activations_0.safetensors": {
        "missing": Path.unlink,
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "not activations": lambda path: save_file({"a": torch.zeros(1)}, str(path)),
        "of features that there are not": damage_features,
    },
    "rollouts.jsonl": {
        "missing": Path.unlink,
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
        "a line less": lambda path: path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1])),
        "a line twice": lambda path: path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n"),
    },
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in DAMAGED.items() for kind in kinds])
def test_damaged_activations_and_completions_are_refused_and_say_where(tmp_path, old, name, kind):
    old.save(tmp_path)
    DAMAGED[name][kind](tmp_path / name)
    with pytest.raises(CorrSteerError) as caught:
        list(Run.load(tmp_path).rollouts)
    assert name in str(caught.value)


def test_a_run_whose_directory_another_was_saved_to_says_so_and_reads_none_of_it(tmp_path, old, new):
    old.save(tmp_path)
    loaded, derived = Run.load(tmp_path), Run.load(tmp_path).statistics(permutations=0)
    for again in (1, 2):  # the second time files have the names of the first run's
        new.save(tmp_path)
        for asked in (
            lambda: loaded.rollouts[0],
            lambda: loaded.statistics(pool="last_prompt"),
            lambda: derived.statistics(permutations=0),
            lambda: loaded.save(tmp_path / "elsewhere"),
        ):
            with pytest.raises(CorrSteerError, match="is not what it was, as another run was saved there"):
                asked()
        assert same(Run.load(tmp_path), new), again
    assert loaded.n == old.n and derived.n == old.n


def test_runs_that_share_activations_go_on_when_one_of_them_is_saved(tmp_path, world, old):
    run = gather(world, 6, directory=tmp_path / "run")
    other = run.statistics(permutations=0)
    run.save(tmp_path / "run")
    assert not (tmp_path / "run" / "collecting").exists() and other.statistics(permutations=0).n == 6
    other.save(tmp_path / "other")
    for loaded in (Run.load(tmp_path / "run"), Run.load(tmp_path / "other")):
        assert torch.equal(loaded.correlation(1), old.correlation(1))
    assert run.statistics(permutations=0).n == 6


def test_a_run_that_is_saved_again_where_it_is_goes_on_from_its_new_files(tmp_path, old):
    old.save(tmp_path)
    loaded = Run.load(tmp_path)
    for _ in range(3):
        loaded.save(tmp_path)
        assert [one.completion for one in loaded.rollouts] == [one.completion for one in old.rollouts]
        assert loaded.statistics(permutations=0).n == old.n


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda run: run["provenance"]["samples"].update(n="6"), "provenance does not say which samples"),
        (lambda run: run["provenance"].update(samples="all"), "is damaged"),
        (lambda run: run["layers"]["1"]["evidence"].popitem(), "evidence of layer 1 is of other poolings"),
    ],
)
def test_a_description_that_says_something_else_than_its_files_is_damaged(tmp_path, world, change, words):
    gather(world, 6).save(tmp_path)
    described = json.loads((tmp_path / "run.json").read_text())
    change(described)
    (tmp_path / "run.json").write_text(json.dumps(described))
    with pytest.raises(CorrSteerError, match=words):
        Run.load(tmp_path)


def test_rewards_of_another_kind_are_damaged(tmp_path, world):
    gather(world, 6).save(tmp_path)
    arrays = load_file(str(tmp_path / "rewards.safetensors"))
    save_file(arrays | {"rewards": arrays["rewards"].to(torch.int64)}, str(tmp_path / "rewards.safetensors"))
    with pytest.raises(CorrSteerError, match="rewards are no float64 numbers"):
        Run.load(tmp_path)


def test_rollouts_of_samples_that_are_not_there_are_damaged(tmp_path, world):
    gather(world, 6).save(tmp_path)
    arrays = load_file(str(tmp_path / "rewards.safetensors"))
    save_file(arrays | {"order": arrays["order"] + 5}, str(tmp_path / "rewards.safetensors"))
    with pytest.raises(CorrSteerError, match="its rollouts are not of its 6 samples"):
        Run.load(tmp_path)


def test_an_interrupt_once_the_new_run_has_taken_its_place_leaves_it_there(directory, new, monkeypatch):
    replace = os.replace

    def interrupted(source, target):
        replace(source, target)
        if Path(target).name == "run.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        new.save(directory)
    assert same(Run.load(directory), new) and untouched(directory)
