"""collect: what it gathers, what it refuses before it starts, and what it keeps when it must stop."""

import concurrent.futures
import copy
import dataclasses
import json
import os
import signal

import pytest
import tiny_pipeline
import torch

from corrsteer import (
    CorrSteerError,
    Evidence,
    Moments,
    Run,
    SparseEncoder,
    Task,
    collect,
    encode,
    encode_pool,
    scores,
    select,
    update_moments,
)
from corrsteer.lm.decoding import Decoding
from corrsteer.runs.collect import CollectionStopped
from corrsteer.runs.excluded import excluded_tokens
from corrsteer.tasks import with_shuffled_rewards

DECODING = Decoding(max_new_tokens=5, batch_size=16)


@pytest.fixture(scope="module")
def model():
    return tiny_pipeline.model()


def gather(model, **settings):
    settings = {"task": tiny_pipeline.task(), "encoders": tiny_pipeline.encoders(), "decoding": DECODING} | settings
    task, encoders = settings.pop("task"), settings.pop("encoders")
    return collect(model, tiny_pipeline.tokenizer(), encoders, task, progress=False, **settings)


@torch.no_grad()
def one_at_a_time(model, layer, encoder, task, positions, exclude_tokens=()):
    """Moments by pooling, of activations and of residuals, from one sample at a time without a cache or padding."""
    tokenizer = tiny_pipeline.tokenizer()
    of_features = {pool: Moments(encoder.d_sae) for pool in ("max", "mean", "last_prompt")}
    of_residuals = {pool: Moments(encoder.d_in) for pool in ("mean", "last_prompt")}
    newline = tokenizer.convert_tokens_to_ids("\n")
    for example in task.examples:
        ids = tokenizer(example.prompt)["input_ids"]
        prompt, generated = len(ids), []
        for _ in range(DECODING.max_new_tokens):
            generated.append(int(model(torch.tensor([ids + generated])).logits[0, -1].argmax()))
            if generated[-1] in (newline, tokenizer.eos_token_id):
                generated.pop()
                break
        states = model(torch.tensor([ids + generated]), output_hidden_states=True).hidden_states[layer + 1][0]
        kept = list(range(prompt - 1, prompt - 1 + max(1, len(generated))))
        if positions == "all":
            kept = [at for at in range(prompt - 1) if ids[at] not in exclude_tokens] + kept
        z, h = encode(states, encoder), states.float()
        y = torch.tensor([task.reward(tokenizer.decode(generated, skip_special_tokens=True), example)])
        for pool, pooled in (("max", z[kept].amax(0)), ("mean", z[kept].mean(0)), ("last_prompt", z[prompt - 1])):
            update_moments(pooled[None], y, of_features[pool])
        for pool, pooled in (("mean", h[kept].mean(0)), ("last_prompt", h[prompt - 1])):
            update_moments(pooled[None], y, of_residuals[pool])
    return of_features, of_residuals


def assert_same_moments(moments, expected, tolerance=2e-4):
    """Of the same poolings, the same numbers."""
    assert list(moments) == list(expected)
    for pool in expected:
        for name, a, b in zip(Moments.STATE, moments[pool].state(), expected[pool].state()):
            where = f"{pool} {name}"
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, where=where: f"{where}: {m}")


SMALL = 2 * 16 * 2 * 128 * 4  # bytes of two steps of sixteen rows at two layers


@pytest.mark.parametrize("buffer_bytes", (1 << 30, SMALL), ids=("whole", "in parts"))
@pytest.mark.parametrize("positions", ("generated", "all"))
def test_collect_equals_one_sample_at_a_time_without_cache_or_padding(model, positions, buffer_bytes):
    run = gather(model, pool="max", coefficient_pool="mean", positions=positions, buffer_bytes=buffer_bytes)
    assert 0 < run.rewards.mean() < 1, "the reward must vary for this to mean anything"
    for layer, encoder in tiny_pipeline.encoders().items():
        bos = tiny_pipeline.tokenizer().bos_token_id
        expected = one_at_a_time(model, layer, encoder, tiny_pipeline.task(), positions, [bos])
        assert_same_moments(run.moments[layer], expected[0])
        assert_same_moments(run.residuals[layer], expected[1])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("pool", ("mean", "max", "last_prompt"))
def test_one_pooling_alone_is_what_it_is_beside_others(dtype, pool):
    model = tiny_pipeline.model().to(dtype)
    both, alone = gather(model, pool="max", coefficient_pool="mean"), gather(model, pool=pool)
    kept = dict.fromkeys((pool, "last_prompt"))
    assert_same_moments(alone.moments[1], {name: both.moments[1][name] for name in kept}, 1e-5)
    assert_same_moments(alone.residuals[1], both.residuals[1], 0)
    assert alone.provenance["model_dtype"] == str(dtype)


def test_the_last_prompt_token_is_pooled_alone_whatever_is_kept_besides(model):
    """What is written cannot change it, nor can the prompt before it: it is all that one new token leaves."""
    one = gather(model, decoding=Decoding(max_new_tokens=1, batch_size=16))
    for settings in ({}, {"positions": "all"}, {"positions": "all", "buffer_bytes": SMALL}):
        run = gather(model, **settings)
        for layer in run.moments:
            for mine, its in ((run.moments, one.moments), (run.residuals, one.residuals)):
                a, b = mine[layer]["last_prompt"].z_mean, its[layer]["last_prompt"].z_mean
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
                assert not torch.allclose(mine[layer][next(iter(mine[layer]))].z_mean, b, rtol=1e-2)


def test_one_new_token_is_encoded_once_for_all_poolings(model, monkeypatch):
    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        return encode_pool(*arguments, **options)

    monkeypatch.setattr("corrsteer.ops.encode_pool", counted)
    settings = {"task": tiny_pipeline.task(16), "coefficient_pool": "mean"}
    run = gather(model, decoding=Decoding(max_new_tokens=1, batch_size=16), **settings)
    assert len(calls) == 2, "once a layer"
    for layer in run.moments:
        same = [run.moments[layer][pool].state() for pool in ("max", "mean", "last_prompt")]
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*same))
    for pool in ("last_prompt", "max", "mean"):  # of more tokens the last prompt token is the first of them
        calls.clear()
        gather(model, task=tiny_pipeline.task(16), pool=pool)
        assert len(calls) == 2, pool


def test_only_the_pooling_that_is_tested_is_permuted(model):
    for pool in ("max", "last_prompt"):
        run = gather(model, pool=pool, permutations=50, bootstrap=20)
        for evidences in run.evidence.values():
            assert {name: (e.permutations, e.bootstrap) for name, e in evidences.items()} == {
                pool: (50, 20)} | {name: (0, 0) for name in {"last_prompt"} - {pool}}  # fmt: skip


@pytest.mark.parametrize("strategy", ("single", "all"))
def test_features_are_selected_by_their_activation_at_the_last_prompt_token(model, strategy):
    run = gather(model, pool="last_prompt", permutations=50)
    best = {layer: run.moments[layer]["last_prompt"].correlation()[0].max(0) for layer in (1, 2)}
    ranked = sorted(best, key=lambda layer: -float(best[layer].values))
    features = select(run, strategy).features
    layers = ranked[:1] if strategy == "single" else [1, 2]
    assert [(f.layer, f.index) for f in features] == [(layer, int(best[layer].indices)) for layer in layers]
    for f in features:
        of_layer = run.moments[f.layer]["last_prompt"].coefficient("mean_positive")
        assert f.coefficient == float(of_layer[0, f.index]) and f.p_adjusted is not None


def test_the_prompt_is_kept_whole_where_that_is_asked_for(model):
    run = gather(model, positions="all", exclude_tokens=(), coefficient_pool="mean")
    for layer, encoder in tiny_pipeline.encoders().items():
        expected = one_at_a_time(model, layer, encoder, tiny_pipeline.task(), "all")
        assert_same_moments(run.moments[layer], expected[0])
        assert_same_moments(run.residuals[layer], expected[1])
    without = gather(model, positions="all")
    assert not torch.equal(without.moments[1]["max"].z_mean, run.moments[1]["max"].z_mean)
    assert (without.provenance["exclude_tokens"], run.provenance["exclude_tokens"]) == ([1], [])


@pytest.mark.parametrize(
    ("named", "excluded"), [(None, (1,)), (False, (1,)), ([5, 7], (1, 5, 7)), (True, (0, 1, 2)), ([], (1,))]
)
def test_tokens_that_an_sae_was_trained_without_are_excluded_with_the_bos_token(named, excluded):
    encoders = tiny_pipeline.encoders()
    encoders[2].metadata["exclude_special_tokens"] = named
    assert excluded_tokens(tiny_pipeline.tokenizer(), encoders.values()) == excluded


def test_excluding_tokens_of_prompts_that_are_not_read_is_refused(model):
    with pytest.raises(CorrSteerError, match="exclude_tokens must be left out unless positions is 'all'"):
        gather(model, exclude_tokens=[1])


def test_a_tokenizer_without_a_bos_token_excludes_nothing():
    tokenizer = copy.deepcopy(tiny_pipeline.tokenizer())
    tokenizer.bos_token = None
    assert excluded_tokens(tokenizer, tiny_pipeline.encoders().values()) == ()


def test_collected_evidence_is_of_the_same_samples_and_says_the_same_r(model):
    run = gather(model, coefficient_pool="mean", permutations=50, bootstrap=20, block_size=16)
    for layer in run.moments:
        for pool in ("max", "mean", "last_prompt"):
            evidence = run.evidence[layer][pool]
            assert evidence.n == run.n == 40 and evidence.blocks == {0, 1, 2}
            torch.testing.assert_close(
                scores.correlation(evidence), run.moments[layer][pool].correlation()[0], rtol=0, atol=1e-9
            )
        # what the coefficient is read from is not what is tested
        assert (run.evidence[layer]["max"].permutations, run.evidence[layer]["mean"].permutations) == (50, 0)
    assert [s.n for s in run.snapshots] == [16, 32, 40] and set(run.snapshots[0].leaders) == {1, 2}
    final = {layer: int(run.correlation(layer).argmax()) for layer in run.moments}
    assert {layer: best.feature for layer, (best, _) in run.snapshots[-1].leaders.items()} == final


def test_evidence_depends_on_the_seed_and_the_blocks_and_not_on_batches(model):
    settings = {"permutations": 30, "bootstrap": 10, "block_size": 16}
    one, many, other = (
        gather(model, decoding=Decoding(max_new_tokens=5, batch_size=size), shuffle_seed=seed, **settings)
        for size, seed in ((1, 0), (64, 0), (64, 1))
    )
    a, b, c = (run.evidence[1]["max"] for run in (one, many, other))
    torch.testing.assert_close(a.sums, b.sums, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(b.columns("permuted"), c.columns("permuted"), rtol=1e-2)
    torch.testing.assert_close(many.correlation(1), other.correlation(1), rtol=0, atol=1e-4)


def test_statistics_that_would_not_fit_are_refused_with_their_size_before_anything_is_generated(model, monkeypatch):
    settings = {"permutations": 0, "encoders": tiny_pipeline.encoders((1,), d_sae=100), "keep_activations": "never"}
    evidence = sum(evidence.nbytes for evidence in gather(model, **settings).evidence[1].values())
    needed = evidence + 40 * 4 * (2 * 100 + 2 * 128)  # and a block's rows, of two poolings of features and residuals
    gather(model, statistics_bytes=needed, **settings)
    monkeypatch.setattr(model, "generate", lambda *a, **k: pytest.fail("generated"), raising=False)
    with pytest.raises(CorrSteerError, match=f"statistics_bytes must be at least {needed}, got {needed - 1}: evidence"):
        gather(model, statistics_bytes=needed - 1, **settings)
    with pytest.raises(CorrSteerError, match=r"statistics_bytes must be at least 80\d+, got 10000000: evidence takes"):
        gather(model, statistics_bytes=10**7, **(settings | {"permutations": 100_000}))


def test_patience_stops_a_collection_whose_best_features_are_clear(model, monkeypatch):
    asked = []

    def stable(snapshots, patience, layers):
        assert patience == 2
        asked.append(list(layers))
        return len(snapshots) >= 3

    monkeypatch.setattr("corrsteer.stats.stability.stable", stable)
    run = gather(model, block_size=8, patience=2, patience_layers=[1, 2])
    assert run.n == int(run.rewards.isfinite().sum()) == 24 and len(run.snapshots) == 3
    assert "stopped after 24 of 40 samples" in run.notes[0] and select(run, "all").features
    assert asked == [[1, 2]] * 3
    assert gather(model, block_size=14, patience=2).notes == [], "the last block is the last anyhow"
    assert asked[3:] == [list(run.points)] * 2, "by default all layers are waited for"
    for layers, message in (([], "must hold at least one number"), ([1, 9], r"must be some of \[1, 2\], got")):
        with pytest.raises(CorrSteerError, match=f"patience_layers {message}"):
            gather(model, patience=2, patience_layers=layers)


def test_a_part_of_a_block_is_of_the_samples_that_were_graded(model):
    """Stopped in the middle of a block, whose batches go by length: the run is that of its samples alone."""
    task, calls = tiny_pipeline.task(), []

    def grader(completion, example):
        calls.append(1)
        if len(calls) > 24:
            raise KeyboardInterrupt
        return tiny_pipeline.digits_up(completion, example)

    decoding = Decoding(max_new_tokens=5, batch_size=8)
    with pytest.raises(CollectionStopped, match="interrupted") as stopped:
        gather(model, task=task.graded_by(grader), decoding=decoding, permutations=20)
    part = stopped.value.run
    there = part.rewards.isfinite().nonzero()[:, 0].tolist()
    assert len(there) == part.n == 24 and len({len(task.examples[i].prompt) for i in there}) > 1
    fresh = gather(model, task=dataclasses.replace(task, examples=tuple(task.examples[i] for i in there)))
    assert torch.equal(part.rewards[there], fresh.rewards) and 0 < fresh.rewards.mean() < 1
    for layer in fresh.moments:
        assert_same_moments(part.moments[layer], fresh.moments[layer], 1e-4)
        assert_same_moments(part.residuals[layer], fresh.residuals[layer], 1e-4)
        torch.testing.assert_close(part.correlation(layer), fresh.correlation(layer), rtol=0, atol=1e-5)
        evidence = part.evidence[layer]["max"]
        torch.testing.assert_close(scores.correlation(evidence), part.correlation(layer), rtol=0, atol=1e-9)
    assert part.snapshots[-1].n == 24


def test_examples_are_shuffled_by_the_seed_and_the_longest_prompt_is_generated_first(model):
    def graded(**settings):
        seen = []
        task = tiny_pipeline.task(
            grader=lambda completion, example: float(seen.append(example.prompt) or len(seen) % 2)
        )
        gather(model, task=task, block_size=10, decoding=Decoding(max_new_tokens=2), **settings)
        return seen

    one, other = graded(), graded(shuffle_seed=1)
    given = [example.prompt for example in tiny_pipeline.task().examples]
    assert sorted(one) == sorted(other) == sorted(given) and one != other
    assert sorted(one[:10]) != sorted(given[:10]) and sorted(one[:10]) != sorted(other[:10])
    assert len(one[0]) == max(map(len, given))


def test_no_memory_for_the_statistics_is_said_before_anything_is_generated(model, monkeypatch):
    zeros = torch.zeros

    def none_left(*shape, device=None, **options):
        if str(device) == "cpu" and shape[0] == (48, 1000):
            raise torch.OutOfMemoryError("too much")
        return zeros(*shape, device=device, **options)

    monkeypatch.setattr("torch.zeros", none_left)
    with pytest.raises(CorrSteerError, match="no memory for the statistics .OutOfMemoryError.: evidence takes"):
        gather(model, permutations=1000, keep_activations="never")


def test_evidence_that_cannot_be_added_to_is_given_up_and_the_rest_of_the_run_kept(model, monkeypatch):
    update, calls = Evidence.update, []

    def fails(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 8:  # the second layer of the second block, of two poolings a layer
            raise MemoryError("no room")
        return update(self, *arguments, **options)

    monkeypatch.setattr(Evidence, "update", fails)
    with pytest.raises(CollectionStopped, match="no room") as stopped:
        gather(model, block_size=16, keep_activations="never")
    run = stopped.value.run
    assert run.n == run.residuals[2]["mean"].n == 32
    assert run.evidence == {} and "no intervals or tests" in run.notes[0]
    assert not run.testable() and select(run, "all").features[0].statistics.p_adjusted is None
    calls.clear()
    with pytest.raises(CollectionStopped, match="no room") as stopped:
        gather(model, block_size=16)
    kept = stopped.value.run
    assert kept.n == 32 and kept.testable() and select(kept, "all").features[0].statistics.p_adjusted is not None
    assert torch.equal(kept.correlation(2), run.correlation(2)), "and from rows there is evidence all the same"


def test_of_two_failures_the_first_is_the_reason(model, monkeypatch):
    def grader(completion, example, seen=[]):  # noqa: B006
        seen.append(1)
        if len(seen) > 20:
            raise ValueError("the grader's own")
        return float(len(seen) % 2)

    def fails(self, *arguments, **options):
        raise MemoryError("no room")

    monkeypatch.setattr(Evidence, "update", fails)
    with pytest.raises(CollectionStopped, match="the grader's own") as stopped:
        gather(model, task=tiny_pipeline.task(grader=grader))
    assert stopped.value.run.n == 16 and "no intervals or tests" in stopped.value.run.notes[0]


def test_a_collection_runs_in_a_thread_of_its_own_as_well(model):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        run = pool.submit(gather, model).result()
    assert torch.equal(run.correlation(1), gather(model).correlation(1))


def test_an_interrupt_while_a_block_is_folded_in_waits_for_its_end(model, monkeypatch, interruptible):
    update = Evidence.update

    def interrupted(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return update(self, *arguments, **options)

    monkeypatch.setattr(Evidence, "update", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(CollectionStopped, match="interrupted") as stopped:
        gather(model, block_size=16)
    run = stopped.value.run
    assert {run.n, *(e["max"].n for e in run.evidence.values())} == {16}
    assert signal.getsignal(signal.SIGINT) is before


def test_shuffled_rewards_are_the_same_rewards_of_other_examples(model):
    run = gather(model)
    control = with_shuffled_rewards(tiny_pipeline.task(), run.rewards.tolist(), seed=1)
    shuffled = gather(model, task=control).rewards
    assert not torch.equal(shuffled, run.rewards) and torch.equal(shuffled.sort().values, run.rewards.sort().values)
    assert control.grader_name == "shuffled rewards"
    again = [with_shuffled_rewards(tiny_pipeline.task(), run.rewards.tolist(), seed=seed) for seed in (1, 2)]
    same, other = ([task.reward("", e) for e in task.examples] for task in again)
    assert same == shuffled.tolist() != other
    with pytest.raises(CorrSteerError, match="rewards must be finite"):
        with_shuffled_rewards(tiny_pipeline.task(), [float("nan")] * 40)
    with pytest.raises(CorrSteerError, match="rewards must be those of the task's 40 examples, got 3"):
        with_shuffled_rewards(tiny_pipeline.task(), [1.0, 0.0, 1.0])


def test_the_batches_a_task_falls_into_do_not_change_the_result(model):
    one, many = (gather(model, decoding=Decoding(max_new_tokens=5, batch_size=size)) for size in (1, 64))
    assert torch.equal(one.rewards, many.rewards)
    for a, b in zip(one.moments[1]["max"].state(), many.moments[1]["max"].state()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_hook_offset_reads_the_layer_before(model):
    early = gather(model, hook_offset=-1, encoders=tiny_pipeline.encoders((2,)))
    encoder = tiny_pipeline.encoders((2,))[2]
    plain = gather(model, encoders={1: SparseEncoder(**(vars(encoder) | {"hook_name": "blocks.1.hook_resid_post"}))})
    assert str(early.points[2]) == "blocks.1.hook_resid_post"
    for a, b in zip(early.moments[2]["max"].state(), plain.moments[1]["max"].state()):
        assert torch.equal(a, b)


def test_hook_offset_before_layer_0_reads_its_input(model):
    run = gather(model, hook_offset=-1, encoders={0: SparseEncoder.identity(128)})
    assert str(run.points[0]) == "blocks.0.hook_resid_pre"


def test_an_identity_encoder_collects_residual_dimensions(model):
    run = gather(model, encoders={1: SparseEncoder.identity(128)}, pool="mean")
    assert run.correlation(1).shape == (128,) and bool((run.correlation(1) != 0).all())


def test_a_saved_run_is_the_same_when_loaded(model, tmp_path):
    run = gather(model, coefficient_pool="mean", permutations=20, scores=("pearson", "squared_ratio"))
    run.save(tmp_path / "run")
    loaded = Run.load(tmp_path / "run")
    for layer in run.moments:
        for pool in ("mean", "last_prompt"):
            pairs = zip(run.residuals[layer][pool].state(), loaded.residuals[layer][pool].state())
            assert all(torch.equal(a, b) for a, b in pairs) and loaded.residuals[layer][pool].n == 40
        for pool in ("max", "mean", "last_prompt"):
            pairs = zip(run.moments[layer][pool].state(), loaded.moments[layer][pool].state())
            assert all(torch.equal(a, b) for a, b in pairs)
            assert torch.equal(run.evidence[layer][pool].sums, loaded.evidence[layer][pool].sums)
        for score in ("pearson", "squared_ratio"):
            assert torch.equal(run.significance(score)[layer].q, loaded.significance(score)[layer].q)
    assert torch.equal(run.rewards, loaded.rewards)
    for name in ("pool", "coefficient_pool", "points", "snapshots", "notes", "provenance", "n"):
        assert getattr(run, name) == getattr(loaded, name), name


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(CorrSteerError, match="is not a saved run: it has no run.json"):
        Run.load(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CorrSteerError, match="is damaged"):
        Run.load(tmp_path)


EDITED = {
    "not a dict": {"layers": [1]}, "another pool": {"pool": "x"}, "another coefficient pool": {"coefficient_pool": "x"},
    "notes of one": {"notes": "one"}, "no provenance": {"provenance": None},
}  # fmt: skip


@pytest.mark.parametrize(
    "damage", ("no pool", "no rewards", "rewards cut", "moments cut", "moments of another size", *EDITED)
)
def test_a_damaged_run_is_refused(model, tmp_path, damage):
    gather(model).save(tmp_path)
    described = json.loads((tmp_path / "run.json").read_text()) | EDITED.get(damage, {})
    if damage == "no pool":
        del described["pool"]
    (tmp_path / "run.json").write_text(json.dumps(described))
    if damage == "no rewards":
        (tmp_path / "rewards.safetensors").unlink()
    if damage == "rewards cut":
        (tmp_path / "rewards.safetensors").write_bytes((tmp_path / "rewards.safetensors").read_bytes()[:-4])
    if damage == "moments cut":
        (tmp_path / "layer_1.max.safetensors").write_bytes(b"")
    if damage == "moments of another size":
        broken = Moments(5)
        broken.z_mean = torch.zeros(4, dtype=torch.float64)
        broken.save(tmp_path / "layer_1.max.safetensors")
    with pytest.raises(CorrSteerError, match="damaged"):
        Run.load(tmp_path)


@pytest.mark.parametrize("failure", (RuntimeError("out of memory"), KeyboardInterrupt()))
def test_a_failure_between_layers_leaves_the_run_as_it_was_before_the_batch(model, monkeypatch, failure):
    calls = []

    def update(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:  # the second layer of the second batch
            raise failure
        return encode_pool(*arguments, **options)

    monkeypatch.setattr("corrsteer.ops.encode_pool", update)
    with pytest.raises(CollectionStopped, match="(out of memory|interrupted).*the 16 samples") as stopped:
        gather(model)
    run = stopped.value.run
    states = [m for of in (run.moments, run.residuals) for by_pool in of.values() for m in by_pool.values()]
    assert {m.n for m in states} == {int(run.rewards.isfinite().sum())} == {16} and len(states) == 8


def test_a_wrapper_around_the_model_is_seen_through(model):
    class Wrapper(torch.nn.Module):
        """As PEFT wraps a model: generate runs the model inside, and not the wrapper's forward."""

        def __init__(self, base):
            super().__init__()
            self.base = base

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.base, name)

        def generate(self, *arguments, **options):
            return self.base.generate(*arguments, **options)

    class Peft(Wrapper):
        def get_base_model(self):
            return self.base

    plain = gather(model, positions="all").moments[1]["max"].state()
    for wrapper in (Wrapper, Peft):
        wrapped = gather(wrapper(model), positions="all").moments[1]["max"].state()
        assert all(torch.equal(a, b) for a, b in zip(plain, wrapped))


def test_a_reward_that_never_varies_is_noted(model):
    run = gather(model, task=tiny_pipeline.task(grader=lambda completion, example: 1.0))
    assert run.notes and "every one of the 40 rewards was 1, so nothing correlates" in run.notes[0]


REFUSED = {
    "an empty task": ({"task": tiny_pipeline.task().take(0)}, "task 'untrained' is empty"),
    "no encoders": ({"encoders": {}}, "encoders must map at least one layer"),
    "an SAE of another width": (
        {"encoders": tiny_pipeline.encoders(d_in=64)},
        r"encoders\[1\] has d_in=64, but the model's residual stream is 128 wide",
    ),
    "an SAE of another layer": (
        {"encoders": {2: tiny_pipeline.encoders()[1]}},
        r"encoders\[2\] was trained at blocks.1",
    ),
    "a layer outside the model": (
        {"encoders": tiny_pipeline.encoders((9,))},
        "outside the model, whose layers are 0..3",
    ),
    "an unknown pool": ({"pool": "sum"}, "^pool must be one of max, mean, last_prompt, got 'sum'"),
    "an unknown pool of coefficients": (
        {"coefficient_pool": "both"},
        "^coefficient_pool must be one of max, mean, last_prompt, got 'both'",
    ),
    "a pool that is no word": ({"pool": ["max"]}, "^pool must be one of max, mean, last_prompt, got list"),
    "unknown positions": ({"positions": "prompt"}, "positions must be one of generated, all, got 'prompt'"),
    "a prompt longer than the context": (
        {"task": Task.from_rows([{"prompt": "1" * 125, "answer": "1"}])},
        r":1: the prompt has 126 tokens",
    ),
    "a block of no samples": ({"block_size": 0}, "block_size must be a whole number of at least 1, got 0"),
    "half a block": ({"block_size": 2.5}, "block_size must be a whole number of at least 1, got 2.5"),
    "a negative seed": ({"shuffle_seed": -1}, "shuffle_seed must be a whole number of at least 0, got -1"),
    "too few permutations": ({"permutations": 10}, "permutations must be 0 or at least 19, .* got 10"),
    "blocks of one": ({"block_size": 1}, "block_size must be at least 2 for permutations"),
    "a score of activations that are not kept": (
        {"scores": ("pearson", "auroc"), "keep_activations": "never"},
        "scores must be among pearson, .* where activations are not kept, got auroc",
    ),
    "an unknown score": ({"scores": ("kendall",)}, "scores must be among pearson, "),
    "an unknown backend": ({"backend": "magic"}, "backend must be one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_be_known_before_is_refused_before_anything_is_generated(model, name, monkeypatch):
    settings, message = REFUSED[name]
    monkeypatch.setattr(
        model, "generate", lambda *a, **k: pytest.fail("generated before it was refused"), raising=False
    )
    with pytest.raises(CorrSteerError, match=message):
        gather(model, **settings)


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_a_reward_that_is_not_a_number_stops_with_the_example_and_keeps_what_was_collected(model, bad):
    seen = []

    def grader(completion, example):
        seen.append(example)
        return bad if len(seen) == 20 else float(len(seen) % 2)

    with pytest.raises(CollectionStopped, match="must return a finite number.*16 samples collected before") as stopped:
        gather(model, task=tiny_pipeline.task(grader=grader))
    assert stopped.value.run.n == 16 and int(stopped.value.run.rewards.isfinite().sum()) == 16


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_activations_that_are_not_numbers_stop_before_any_moments_change(bad):
    broken = tiny_pipeline.model()
    with torch.no_grad():
        broken.model.layers[2].mlp.down_proj.weight[3, 5] = bad
    with pytest.raises(
        CollectionStopped, match="activations at blocks.2.hook_resid_post are NaN or infinite for"
    ) as stopped:
        gather(broken)
    run = stopped.value.run
    assert {m.n for of in (run.moments, run.residuals) for by in of.values() for m in by.values()} == {0}


def test_an_interrupt_from_the_keyboard_keeps_what_was_collected(model):
    def grader(completion, example, seen=[]):  # noqa: B006
        seen.append(1)
        if len(seen) == 20:
            raise KeyboardInterrupt
        return float(len(seen) % 2)

    with pytest.raises(CollectionStopped, match="interrupted") as stopped:
        gather(model, task=tiny_pipeline.task(grader=grader))
    assert stopped.value.run.n == 16


def test_the_model_is_left_as_it_was(model):
    before = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    attributes = set(vars(model))
    gather(model)
    assert before == {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    assert set(vars(model)) == attributes
