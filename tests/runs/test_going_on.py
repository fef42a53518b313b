"""Collections that are stopped anywhere and gone on with: the result is that of one that was never stopped."""

import json

import pytest
import tiny_pipeline
import torch
from safetensors import safe_open

from corrsteer import CorrSteerError, Decoding, Run, SparseEncoder, collect, ops
from corrsteer.rollouts.journal import JobDiffers
from corrsteer.runs.collect import CollectionStopped
from corrsteer.runs.journal import CollectionJournal

GREEDY = Decoding(3, batch_size=6)
WAYS = {
    "rows": {},
    "streamed": {"keep_activations": "never", "bootstrap": 5, "scores": ("pearson", "squared_ratio")},
    "rows, then streamed": {"activation_bytes": 20_000},
    "all positions, several poolings": {"positions": "all", "coefficient_pool": "mean", "buffer_bytes": 20_000},
    "patience": {"patience": 1, "permutations": 0},
    "sampled, within prompts": {
        "samples_per_prompt": 3, "within_prompt": True, "decoding": Decoding(3, temperature=1.5, batch_size=6),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def world():
    return tiny_pipeline.model(), tiny_pipeline.tokenizer(), tiny_pipeline.encoders()


def gather(world, directory, stop=None, **settings):
    """Collect; with `stop`, be interrupted when so many completions have been graded."""
    graded = []

    def grader(completion, example):
        graded.append(1)
        if len(graded) == stop:
            raise KeyboardInterrupt
        return {"even": tiny_pipeline.digits_up(completion, example), "length": len(completion)}

    task = tiny_pipeline.task(14 if "samples_per_prompt" in settings else 40, grader)
    settings = {"decoding": GREEDY, "permutations": 19, "block_size": 16} | settings
    run = collect(*world, task, directory=directory, progress=False, **settings)
    return run, len(graded)


def contents(directory):
    """The files of a run, to be compared to the bit; safetensors writes its metadata in any order."""
    found = {}
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        found[path.name] = path.read_bytes()
        if path.suffix == ".safetensors":
            with safe_open(str(path), "pt") as file:
                tensors = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}
                found[path.name] = tensors, file.metadata()
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_collection_stopped_at_any_batch_comes_to_the_same_bits(world, tmp_path, monkeypatch, way):
    monkeypatch.setattr("corrsteer.runs.journal.EVERY", 0.0)
    monkeypatch.setattr("corrsteer.runs.journal.SHARE", 0.0)
    _, n = gather(world, tmp_path / "whole", **WAYS[way])
    expected = contents(tmp_path / "whole")
    for stop in range(1, n + 1, 8):
        directory = tmp_path / f"stopped at {stop}"
        with pytest.raises(CollectionStopped, match="interrupted"):
            gather(world, directory, stop, **WAYS[way])
        _, again = gather(world, directory, **WAYS[way])
        assert n - stop < again <= n - stop + 7, "what was there was not made again, but for the batch that stopped"
        assert contents(directory) == expected, stop


def test_a_collection_that_is_stopped_again_and_again_comes_to_the_same_bits(world, tmp_path):
    gather(world, tmp_path / "whole")
    stops = 0
    while not (tmp_path / "run" / "run.json").exists():
        with pytest.raises(CollectionStopped) if stops < 6 else pytest.MonkeyPatch.context():
            gather(world, tmp_path / "run", 7 if stops < 6 else None)
        stops += 1
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_what_is_read_again_goes_on_too(world, tmp_path):
    rollouts = gather(world, tmp_path / "first")[0].rollouts
    kwargs = {"permutations": 19, "block_size": 16, "decoding": GREEDY, "progress": False}
    collect(*world, rollouts=rollouts, directory=tmp_path / "whole", **kwargs)
    calls = []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("CUDA out of memory")
        return real(self, *arguments)

    real = CollectionJournal.write
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CollectionJournal, "write", failing)
        with pytest.raises(CollectionStopped, match="out of memory"):
            collect(*world, rollouts=rollouts, directory=tmp_path / "run", **kwargs)
    collect(*world, rollouts=rollouts, directory=tmp_path / "run", **kwargs)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    others = [rollouts[1], rollouts[0], *rollouts[2:]]
    with pytest.raises(JobDiffers, match="rollouts was"):
        collect(*world, rollouts=others, directory=tmp_path / "run", **kwargs)


def stopped(world, directory, stop=20, **settings):
    with pytest.raises(CollectionStopped) as caught:
        gather(world, directory, stop, **settings)
    assert caught.value.unfinished == directory / "collecting"
    return caught.value.run


def test_another_collection_does_not_go_on_with_it_and_every_difference_is_listed(world, tmp_path):
    stopped(world, tmp_path / "run")
    model, tokenizer, encoders = world
    other = model, tokenizer, {**encoders, 2: tiny_pipeline.encoders((2,), seed=9)[2]}
    for other_world, settings, words in (
        (world, {"permutations": 38, "pool": "mean"}, ["permutations was 19, is 38", 'pool was "max", is "mean"']),
        (other, {}, ["saes.2.weights was"]),
        ((tiny_pipeline.model(seed=5), tokenizer, encoders), {}, ["model.weights was"]),
        (world, {"decoding": Decoding(4, batch_size=6)}, ["decoding.max_new_tokens was 3, is 4"]),
    ):
        with pytest.raises(JobDiffers, match="Ask for the same to go on, begin anew \\(--force\\)") as caught:
            gather(other_world, tmp_path / "run", **settings)
        assert all(word in str(caught.value) for word in words), caught.value
    run, graded = gather(world, tmp_path / "run", anew=True)
    assert graded == run.n == 40


def test_a_finished_run_is_given_back_and_another_is_refused(world, tmp_path):
    run, _ = gather(world, tmp_path / "run")
    again, graded = gather(world, tmp_path / "run")
    assert graded == 0 and torch.equal(again.correlation(1), run.correlation(1))
    assert not (tmp_path / "run" / "collecting").exists()
    with pytest.raises(JobDiffers, match="the run that is there in .* permutations was 19, is 38"):
        gather(world, tmp_path / "run", permutations=38)
    assert not (tmp_path / "run" / "collecting").exists()
    assert gather(world, tmp_path / "run", permutations=38, anew=True)[1] == 40


def test_a_finished_run_stays_until_the_one_that_was_begun_anew_is_finished(world, tmp_path):
    gather(world, tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(CollectionStopped):
        gather(world, tmp_path / "run", 20, permutations=38, anew=True)
    assert contents(tmp_path / "run") == before
    assert gather(world, tmp_path / "run", permutations=38)[0].permutations == 38


def test_a_regraded_run_is_not_taken_for_the_one_that_was_collected(world, tmp_path):
    run, _ = gather(world, tmp_path / "run")
    run.statistics("length").save(tmp_path / "run")
    with pytest.raises(JobDiffers):
        gather(world, tmp_path / "run")


@pytest.mark.parametrize("way", ["rows", "streamed"])
def test_what_is_there_can_be_made_a_run(world, tmp_path, way):
    left = stopped(world, tmp_path / "run", **WAYS[way])
    run, graded = gather(world, tmp_path / "run", finish=True, **WAYS[way])
    assert graded == 0 and 0 < run.n == left.n < 40 and not (tmp_path / "run" / "collecting").exists()
    assert torch.equal(run.correlation(1), left.correlation(1))
    assert Run.load(tmp_path / "run").n == run.n
    with pytest.raises(CorrSteerError, match="finish must be False unless some samples are in"):
        gather(world, tmp_path / "other", finish=True)
    with pytest.raises(CorrSteerError, match="finish must be False without a directory"):
        gather(world, None, finish=True)


def test_saving_a_stopped_run_leaves_what_it_takes_to_go_on(world, tmp_path):
    gather(world, tmp_path / "whole")
    stopped(world, tmp_path / "run").save(tmp_path / "run")
    assert 0 < Run.load(tmp_path / "run").n < 40
    gather(world, tmp_path / "run")
    run, whole = (Run.load(tmp_path / name) for name in ("run", "whole"))
    assert run.n == 40 and torch.equal(run.correlation(1), whole.correlation(1))


def test_a_damaged_batch_is_said_to_be_and_made_again_once_it_is_removed(world, tmp_path):
    gather(world, tmp_path / "whole")
    stopped(world, tmp_path / "run", stop=11)
    (batch, *_) = sorted((tmp_path / "run" / "collecting").glob("batch_*.safetensors"))
    batch.write_bytes(batch.read_bytes()[:-10])
    with pytest.raises(CollectionStopped, match=r"is damaged .* remove .*\.jsonl, so that it is made again"):
        gather(world, tmp_path / "run")
    batch.with_suffix(".jsonl").unlink()
    gather(world, tmp_path / "run")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_dense_features_go_on_too(world, tmp_path):
    encoders = {1: SparseEncoder.identity(128)}
    gather((*world[:2], encoders), tmp_path / "whole")
    stopped((*world[:2], encoders), tmp_path / "run", 33)
    gather((*world[:2], encoders), tmp_path / "run")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_the_manifest_says_what_was_begun_in_words(world, tmp_path):
    stopped(world, tmp_path / "run")
    begun = json.loads((tmp_path / "run" / "collecting" / "manifest.json").read_text())["begun"]
    assert begun["decoding"]["max_new_tokens"] == 3 and begun["permutations"] == 19
    assert begun["saes"]["1"]["point"] == "blocks.1.hook_resid_post"


def streamed(world, directory, monkeypatch, stop=33):
    """A collection that is stopped once a state was saved."""
    monkeypatch.setattr("corrsteer.runs.journal.EVERY", 0.0)
    monkeypatch.setattr("corrsteer.runs.journal.SHARE", 0.0)
    stopped(world, directory, stop, keep_activations="never")
    assert (directory / "collecting" / "state.json").exists()


def test_another_version_is_noted_also_where_a_state_was_saved(world, tmp_path, monkeypatch):
    streamed(world, tmp_path / "run", monkeypatch)
    monkeypatch.setattr("torch.__version__", "2.99.0")
    run, _ = gather(world, tmp_path / "run", keep_activations="never")
    assert len([note for note in run.notes if "and gone on with 2.99.0" in note]) == 1
    assert len(set(run.notes)) == len(run.notes)


def test_a_damaged_state_is_begun_anew(world, tmp_path, monkeypatch):
    streamed(world, tmp_path / "run", monkeypatch)
    (tmp_path / "run" / "collecting" / "state.json").write_text("{")
    with pytest.raises(CorrSteerError, match="state.json is damaged .*; begin anew"):
        gather(world, tmp_path / "run", keep_activations="never")
    assert gather(world, tmp_path / "run", keep_activations="never", anew=True)[0].n == 40


def test_how_an_encoder_is_packed_is_no_difference(world, tmp_path):
    """The command line packs encoders where a machine's kernels read them so."""
    pytest.importorskip("corrsteer._native")
    model, tokenizer, encoders = world
    stopped(world, tmp_path / "run")
    packed = {layer: ops.pack(encoder) for layer, encoder in encoders.items()}
    run, graded = gather((model, tokenizer, packed), tmp_path / "run")
    assert run.n == 40 and graded < 40


def test_a_run_that_was_finished_early_says_so(world, tmp_path):
    stopped(world, tmp_path / "run")
    run, _ = gather(world, tmp_path / "run", finish=True)
    again, graded = gather(world, tmp_path / "run")
    assert graded == 0 and again.n == run.n < 40
    assert f"finished after {run.n} of 40 samples, as was asked for" in again.notes


def test_a_grader_that_was_changed_is_noted(world, tmp_path):
    def grade(completion, example):
        return tiny_pipeline.digits_up(completion, example)

    first = tiny_pipeline.task(40, grade)

    def grade(completion, example):
        return float(len(completion) % 2)

    second = tiny_pipeline.task(40, grade)
    assert first.grader_name == second.grader_name and first.grading.source != second.grading.source
    settings = {"decoding": GREEDY, "permutations": 19, "block_size": 16, "directory": tmp_path, "progress": False}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CollectionJournal, "write_block", lambda *_: 1 / 0)
        with pytest.raises(CollectionStopped):
            collect(*world, first, **settings)
    run = collect(*world, second, **settings)
    (note,) = (note for note in run.notes if "gone on with" in note)
    assert note.startswith("begun with graders of source")
    assert tiny_pipeline.task(2, "exact").grading.source and tiny_pipeline.task(2, max).grading.source is None
