"""What is sent to other processes: everything a worker needs can be pickled, and copied, and is the same there."""

import copy
import multiprocessing
import pickle

import pytest
import tiny_pipeline
import torch

from corrsteer import Decoding, Run, SparseEncoder, Steering, Task, collect, encode, select
from corrsteer.errors import BackendUnavailable, CorrSteerError
from corrsteer.runs.collect import CollectionStopped
from corrsteer.sae.sources import decoder_in_release
from corrsteer.tasks import TaskError, with_shuffled_rewards


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    from sae_lens import StandardSAE, StandardSAEConfig

    sae = StandardSAE(StandardSAEConfig(d_in=128, d_sae=48))
    directory = tmp_path_factory.mktemp("sae")
    sae.save_model(directory)
    encoders = tiny_pipeline.encoders()
    world = tiny_pipeline.model(), tiny_pipeline.tokenizer(), encoders
    run = collect(
        *world, tiny_pipeline.task(24), permutations=19, bootstrap=20, scores=("pearson", "squared_ratio"),
        decoding=Decoding(3), progress=False,
    )  # fmt: skip
    rows = [{"prompt": f"{n}+", "answer": str(n)} for n in range(6)]
    task = Task.from_rows(rows, grader="regex:^[02468]")
    run.save(directory / "run")
    return {
        "an encoder in memory": SparseEncoder.from_sae_lens(sae),
        "an encoder on disk": SparseEncoder.load(directory).to(precision="bf16x2"),
        "residual dimensions": SparseEncoder.identity(128),
        "a published sae's decoder": decoder_in_release("gpt2-small-res-jb", "blocks.8.hook_resid_pre", False),
        "a run": run,
        "a run that was loaded": Run.load(directory / "run"),
        "moments": run.moments[1]["max"],
        "evidence": run.evidence[1]["max"],
        "a steering": select(run),
        "a task": task,
        "a task with its rewards shuffled": with_shuffled_rewards(task, [0.0, 1, 2, 3, 4, 5]),
        "a task with a function of a module": tiny_pipeline.task(3),
        "decoding": Decoding(7, 0.5),
    }


@torch.no_grad()
def use(what):
    """What an object says when it is used, in numbers that can be compared."""
    if isinstance(what, SparseEncoder):
        x = torch.linspace(-1, 1, 3 * 128).view(3, 128)
        return encode(x, what).tolist(), what.decoder_rows([0, 5]).tolist(), what.metadata
    if isinstance(what, Run):
        return {layer: what.correlation(layer).tolist() for layer in what.points}, what.provenance, what.notes
    if isinstance(what, Task):
        return [what.reward(f"{n}", example) for n, example in enumerate(what.examples)]
    if isinstance(what, Steering):
        return what.features, what.directions.tolist(), what.provenance
    if hasattr(what, "STATE"):
        return [getattr(what, name).tolist() for name in what.STATE]
    return repr(what)


def work(objects):
    """In the worker: use each object, and send it back."""
    return {name: (use(what), what) for name, what in objects.items()}


def test_everything_a_worker_needs_goes_through_a_spawned_process_and_comes_back(objects):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(work, (objects,))
    for name, (said, back) in there.items():
        assert said == use(objects[name]) == use(back), name


def test_everything_a_worker_needs_can_be_copied_and_the_copy_is_its_own(objects):
    for name, what in objects.items():
        copied = copy.deepcopy(what)
        assert copied is not what and use(copied) == use(what), name
    run = copy.deepcopy(objects["a run"])
    run.moments[1]["max"].z_mean.zero_()
    run.provenance["model"] = "another"
    assert objects["a run"].moments[1]["max"].z_mean.any() and objects["a run"].provenance["model"] != "another"


@pytest.mark.parametrize("kind", (CorrSteerError, BackendUnavailable, TaskError))
def test_errors_arrive_as_they_were_raised(kind):
    there = pickle.loads(pickle.dumps(kind("k must be at least 1, got 0")))
    assert type(there) is kind and str(there) == "k must be at least 1, got 0"


def test_a_collection_that_stopped_arrives_with_its_run(objects):
    stopped = CollectionStopped("interrupted", objects["a run"])
    there = pickle.loads(pickle.dumps(stopped))
    assert str(there) == str(stopped) == "interrupted (the 24 samples collected before are kept)"
    assert use(there.run) == use(objects["a run"])
