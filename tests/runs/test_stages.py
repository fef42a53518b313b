"""A run in stages: rollouts and activations that are kept, and what is asked of them afterwards."""

import dataclasses
import json

import pytest
import tiny_pipeline
import torch

from corrsteer import CorrSteerError, Moments, Run, collect, select
from corrsteer.lm.decoding import Decoding
from corrsteer.ops.rows import SparseRows
from corrsteer.rollouts.regrading import task_of
from corrsteer.rollouts.rollout_file import read_rollouts
from corrsteer.runs.collect import CollectionStopped
from corrsteer.runs.journal import CollectionJournal
from corrsteer.runs.peaks import extremes, with_peaks
from corrsteer.runs.regrade import regrade
from corrsteer.tasks import Task

DECODING = Decoding(max_new_tokens=5, batch_size=16)
OPTIONS = {"permutations": 39, "bootstrap": 20, "block_size": 16}


def length(completion, example):
    return float(len(completion))


def both(completion, example):
    return {"even": tiny_pipeline.digits_up(completion, example), "length": length(completion, example)}


@pytest.fixture(scope="module")
def model():
    return tiny_pipeline.model()


def gather(model, **settings):
    task = None if "rollouts" in settings else tiny_pipeline.task()
    settings = {"task": task, "encoders": tiny_pipeline.encoders(), "decoding": DECODING} | OPTIONS | settings
    task, encoders = settings.pop("task"), settings.pop("encoders")
    return collect(model, tiny_pipeline.tokenizer(), encoders, task, progress=False, **settings)


@pytest.fixture(scope="module")
def kept(model):
    return gather(model, keep_activations="always")


@pytest.fixture(scope="module")
def streamed(model):
    return gather(model, keep_activations="never")


def same_state(a, b, tolerance=0.0):
    for name in a.STATE:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance)


def same_statistics(a, b, tolerance=0.0, scores=("pearson",)):
    """The same moments up to a tolerance, and the same p-values."""
    for layer in b.moments:
        for pool in b.moments[layer]:
            same_state(a.moments[layer][pool], b.moments[layer][pool], tolerance)
        for score in scores:
            for name, p in vars(a.significance(score)[layer]).items():
                assert torch.equal(p, getattr(b.significance(score)[layer], name)), (layer, score, name)


def of_label(run):
    """A run's statistics of its first reward alone."""
    moments = {layer: {pool: m.of_labels([0]) for pool, m in pools.items()} for layer, pools in run.moments.items()}
    return dataclasses.replace(run, moments=moments)


def test_a_run_keeps_its_completions_in_the_tasks_order(model, kept):
    task = tiny_pipeline.task()
    assert [rollout.prompt for rollout in kept.rollouts] == [example.prompt for example in task.examples]
    for rollout, reward, example in zip(kept.rollouts, kept.rewards.tolist(), task.examples):
        assert rollout.rewards == {"reward": reward} == {"reward": task.reward(rollout.completion, example)}
        assert rollout.finish in ("stop", "length") and rollout.meta == example.fields
        text = tiny_pipeline.tokenizer().decode(list(rollout.completion_ids), skip_special_tokens=True)
        assert text == rollout.completion
    assert len({rollout.id for rollout in kept.rollouts}) == len(task)


def test_permutations_from_activations_are_those_that_are_streamed(kept, streamed):
    assert kept.activations is not None and streamed.activations is None
    same_statistics(kept, streamed, scores=("pearson", "point_biserial"))
    for layer in streamed.evidence:
        ours, theirs = kept.evidence[layer]["max"], streamed.evidence[layer]["max"]
        torch.testing.assert_close(ours.columns("permuted"), theirs.columns("permuted"), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours.columns("bootstrap"), theirs.columns("bootstrap"), rtol=1e-9, atol=1e-9)
    for strategy in ("single", "all"):
        for interval in ("delta", "bootstrap"):
            a, b = (select(run, strategy, interval=interval) for run in (kept, streamed))
            assert a.features == b.features


def test_a_saved_run_gives_the_same_from_its_files(kept, tmp_path):
    kept.save(tmp_path)
    loaded = Run.load(tmp_path)
    assert list(loaded.rollouts) == list(kept.rollouts)
    same_statistics(loaded, kept)
    encoders = tiny_pipeline.encoders()
    assert select(loaded, encoders=encoders).features == select(kept).features
    again = loaded.statistics(permutations=99)
    assert again.permutations == 99 and again.testable("spearman") and again.testable("auroc")
    for number, path in ((1, tmp_path), (2, tmp_path / "other")):  # in place, and elsewhere
        loaded.save(path)
        names = {file.name for file in path.iterdir()}
        assert len([name for name in names if name.startswith("activations")]) == 3, number
        same_statistics(Run.load(path), kept)


@pytest.mark.parametrize("positions", ("generated", "all"))
@pytest.mark.parametrize("batch_tokens", (40, 16384))
def test_reading_completions_gives_what_capturing_them_gave(model, positions, batch_tokens):
    settings = {"positions": positions, "coefficient_pool": "mean"}
    captured = gather(model, **settings)
    read = gather(model, rollouts=captured.rollouts, decoding=Decoding(5, batch_tokens=batch_tokens), **settings)
    for layer in captured.moments:
        for kind in ("moments", "residuals"):
            for pool, moments in getattr(captured, kind)[layer].items():
                same_state(getattr(read, kind)[layer][pool], moments, 1e-4)
        torch.testing.assert_close(read.correlation(layer), captured.correlation(layer), rtol=1e-5, atol=1e-5)
    assert read.rewards.tolist() == captured.rewards.tolist() and list(read.rollouts) == list(captured.rollouts)
    for strategy in ("single", "all"):
        ours, theirs = (select(run, strategy).features for run in (read, captured))
        assert [(f.layer, f.index) for f in ours] == [(f.layer, f.index) for f in theirs]
        assert [f.coefficient for f in ours] == pytest.approx([f.coefficient for f in theirs], rel=1e-5)


def test_reading_computes_no_logits_and_nothing_above_the_last_hooked_layer(model, kept, monkeypatch):
    assert gather(model, rollouts=kept.rollouts).n == kept.n  # once, as a model is tried on a few tokens
    monkeypatch.setattr(model.lm_head, "forward", lambda *a, **k: pytest.fail("a head"))
    monkeypatch.setattr(model.model.layers[3], "forward", lambda *a, **k: pytest.fail("a layer"))
    assert gather(model, rollouts=kept.rollouts).n == kept.n


def test_another_grader_from_what_was_kept_is_as_if_it_had_been_there(model, kept):
    fresh = gather(model, task=dataclasses.replace(tiny_pipeline.task(grader=length)))
    again = regrade(kept, length)
    same_statistics(again, fresh)
    assert again.rewards.tolist() == fresh.rewards.tolist()
    assert [rollout.rewards for rollout in again.rollouts] == [rollout.rewards for rollout in fresh.rollouts]
    assert kept.rewards.tolist() != again.rewards.tolist() and again.residuals == {}


def test_several_rewards_of_one_run_are_each_what_it_is_alone(model, kept):
    several = gather(model, task=tiny_pipeline.task(grader=both))
    assert list(several.all_rewards()) == ["even", "length"] and several.reward == "even"
    same_statistics(of_label(several.statistics("even")), kept.statistics())
    fresh = gather(model, task=tiny_pipeline.task(grader=length))
    of_length = several.statistics("length")
    same_statistics(of_label(of_length), fresh)
    for layer in fresh.moments:
        for pool in fresh.residuals[layer]:
            same_state(of_length.residuals[layer][pool].of_labels([0]), fresh.residuals[layer][pool])
    best = select(several).features[0]
    layer, index = best.layer, best.index
    assert best.statistics.correlations == {"length": pytest.approx(float(fresh.correlation(layer)[index]))}


def test_without_activations_another_reward_of_the_graders_can_be_had_and_nothing_else(model):
    several = gather(model, task=tiny_pipeline.task(grader=both), keep_activations="never")
    other = several.statistics("length")
    assert other.reward == "length" and other.evidence == {} and not other.testable()
    fresh = gather(model, task=tiny_pipeline.task(grader=length))
    torch.testing.assert_close(other.correlation(1), fresh.correlation(1), rtol=1e-9, atol=1e-9)
    with pytest.raises(CorrSteerError, match="the run holds no activations"):
        several.statistics(permutations=99)
    with pytest.raises(CorrSteerError, match="the run holds no activations, so that other rewards take the model"):
        regrade(several, length)
    with pytest.raises(CorrSteerError, match="reward must be one of even, length, got 'size'"):
        several.statistics("size")


def test_some_of_the_samples_are_as_if_there_were_no_others(model, kept):
    task = tiny_pipeline.task()
    chosen = [i for i, example in enumerate(task.examples) if len(example.prompt) < 5]
    assert 0 < len(chosen) < len(task)
    part = kept.statistics(samples=chosen)
    same_statistics(kept.statistics(samples=lambda rollout: len(rollout.prompt) < 5), part)
    fresh = gather(model, task=dataclasses.replace(task, examples=tuple(task.examples[i] for i in chosen)))
    assert part.n == len(chosen) and part.rewards.isfinite().nonzero()[:, 0].tolist() == chosen
    for layer in fresh.moments:
        for pool in fresh.moments[layer]:
            same_state(part.moments[layer][pool], fresh.moments[layer][pool], 1e-4)


def test_any_number_of_permutations_and_any_score_come_from_activations(kept, streamed, model):
    more = kept.statistics(permutations=199, seed=3)
    other = gather(model, keep_activations="never", permutations=199, scores=["squared_ratio"], shuffle_seed=0)
    assert more.permutations == other.permutations == 199 and more.testable("squared_ratio")
    assert not torch.equal(more.evidence[1]["max"].columns("permuted"), other.evidence[1]["max"].columns("permuted"))
    same = kept.statistics(permutations=199)
    for name in ("p", "p_layer", "p_adjusted", "q"):
        a, b = (getattr(run.significance("squared_ratio")[2], name) for run in (same, other))
        assert torch.equal(a, b)
    by_mean = gather(model, pool="mean")
    last = by_mean.statistics(pool="last_prompt")
    assert torch.equal(last.correlation(1), kept.statistics(pool="last_prompt").correlation(1))


def test_activations_are_kept_while_they_are_small_and_then_streamed(model, streamed):
    task = tiny_pipeline.task()
    for budget in (1, 20_000):
        run = gather(model, activation_bytes=budget)
        assert run.activations is None and f"activation_bytes={budget}, and were no longer kept" in run.notes[0]
        same_statistics(run, streamed)
    assert run.n == len(task) and "after 16 samples" in run.notes[0], "or it was not midway"
    assert gather(model).activations is not None


def test_where_neither_activations_nor_permutations_fit_the_run_stops_with_what_it_has(model):
    needed = sum(e.nbytes for of in gather(model, permutations=0, bootstrap=0).evidence.values() for e in of.values())
    with pytest.raises(CollectionStopped, match="activation_bytes=20000 is what the activations of 16") as stopped:
        gather(model, activation_bytes=20_000, statistics_bytes=needed + 200_000, permutations=10_000)
    run = stopped.value.run
    assert run.n == 16 and run.permutations == 10_000 and run.testable()


def test_a_block_whose_activations_cannot_be_kept_is_not_taken_in(model, monkeypatch):
    made = SparseRows.from_dense
    calls = []

    def full(pooled):
        calls.append(1)
        if len(calls) > 4:  # of two layers and two poolings: in the second block
            raise MemoryError("no memory for rows")
        return made(pooled)

    monkeypatch.setattr(SparseRows, "from_dense", full)
    with pytest.raises(CollectionStopped, match="no memory for rows") as stopped:
        gather(model, keep_activations="always")
    run = stopped.value.run
    assert run.n == 16 and [len(block.samples) for block in run.activations.blocks] == [16] and run.testable()


def test_dense_features_are_streamed_unless_they_are_to_be_kept(model):
    from corrsteer import SparseEncoder

    encoders = {1: SparseEncoder.identity(128)}
    assert gather(model, encoders=encoders).activations is None
    rows = gather(model, encoders=encoders, keep_activations="always")
    same_statistics(rows, gather(model, encoders=encoders))


def test_what_is_under_way_is_on_disk_batch_by_batch(model, tmp_path):
    seen = []

    def grader(completion, example):
        folder = tmp_path / "collecting"
        seen.append(sum(len(read_rollouts(path)) for path in folder.glob("*.jsonl")))
        return tiny_pipeline.digits_up(completion, example)

    run = gather(model, task=tiny_pipeline.task(grader=grader), directory=tmp_path)
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] >= 32
    assert not (tmp_path / "collecting").exists()
    same_statistics(Run.load(tmp_path), run)


def test_a_collection_that_wrote_nothing_leaves_nothing_in_its_directory(model, tmp_path, monkeypatch):
    def failing(completion, example):
        raise ValueError("a mistake")

    with pytest.raises(CorrSteerError, match="statistics_bytes must be at least"):
        gather(model, directory=tmp_path / "run", statistics_bytes=1000)
    with pytest.raises(CollectionStopped, match="a mistake"):
        gather(model, directory=tmp_path / "run", task=tiny_pipeline.task(grader=failing))
    with monkeypatch.context() as full:
        full.setattr("os.fsync", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(CorrSteerError, match="No space left on device"):
            gather(model, directory=tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    assert gather(model, directory=tmp_path / "run").n == 40, "and another may be made there"


def test_a_run_whose_block_found_no_room_on_the_disk_is_selected_from_as_one_without_the_blocks_after(
    model, tmp_path, monkeypatch
):
    def full(self, *a):
        raise CorrSteerError("no space left on device")

    monkeypatch.setattr(CollectionJournal, "write_block", full)
    with pytest.raises(CollectionStopped, match="no space left on device") as stopped:
        gather(model, directory=tmp_path / "run", coefficient_pool="mean")
    run = stopped.value.run
    run.save(tmp_path / "saved")
    reached = [i for i, rollout in enumerate(run.rollouts) if rollout is not None]
    part = gather(model, coefficient_pool="mean").statistics(samples=reached)
    assert run.n == len(reached) == 16
    for found in (run, Run.load(tmp_path / "saved")):
        same_statistics(found, part)
        chosen = select(found, encoders=tiny_pipeline.encoders()).features
        assert chosen == select(part).features and chosen[0].statistics.coefficient_error is not None


def sampled(model, k=4, **settings):
    return gather(
        model, task=tiny_pipeline.task(12), decoding=Decoding(5, temperature=1.5), samples_per_prompt=k, **settings
    )


def test_samples_of_a_prompt_draw_for_themselves_and_stay_together(model):
    few, many = sampled(model, 2), sampled(model, 4, block_size=20)
    assert many.n == 48 and many.rewards.shape == (48,)
    for prompt in range(12):
        of_prompt = many.rollouts[4 * prompt : 4 * prompt + 4]
        assert len({one.prompt for one in of_prompt}) == 1 and [one.sample for one in of_prompt] == [0, 1, 2, 3]
        assert [one.completion for one in few.rollouts[2 * prompt : 2 * prompt + 2]] == [
            one.completion for one in of_prompt[:2]
        ]
    assert len({one.completion for one in many.rollouts}) > 12
    for block in many.activations.blocks:
        prompts = [many.groups[i] for i in block.samples]
        assert all(prompts.count(prompt) == 4 for prompt in prompts)
    with pytest.raises(CorrSteerError, match="samples_per_prompt must be 1 at temperature 0"):
        gather(model, samples_per_prompt=2)


@pytest.mark.parametrize("within", (False, True), ids=("whole prompts", "within prompts"))
def test_clustered_samples_are_permuted_alike_from_rows_and_streaming(model, within, tmp_path):
    rows, stream = (
        sampled(model, within_prompt=within, block_size=16, keep_activations=keep) for keep in ("always", "never")
    )
    assert rows.evidence[1]["max"].clustered and rows.evidence[1]["max"].within == within
    same_statistics(rows, stream)
    assert [any("no delta intervals" in note for note in run.notes) for run in (rows, stream)] == [False, True]
    if within:
        y = rows.rewards.reshape(12, 4)
        y = (y - y.mean(1, keepdim=True)).reshape(-1)
        z = torch.zeros(48, 48, dtype=torch.float64)
        for feature in range(48):
            for sample, value in rows.activations.of_feature(1, "max", feature):
                z[sample, feature] = value
        z = z.reshape(12, 4, -1)
        z = (z - z.mean(1, keepdim=True)).reshape(48, -1)
        norm = z.norm(dim=0) * y.norm()
        expected = torch.where(norm > 1e-9, (y @ z) / norm.clamp(min=1e-12), 0)
        torch.testing.assert_close(rows.correlation(1), expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(stream.correlation(1), expected, rtol=0, atol=1e-9)
    features = select(rows, direction="both").features
    assert all(f.statistics.low is not None for f in features), "intervals take prompts for samples"
    rows.save(tmp_path)
    loaded = Run.load(tmp_path)
    same_statistics(loaded, rows)
    assert loaded.groups == rows.groups
    assert select(loaded, direction="both", encoders=tiny_pipeline.encoders()).features == features
    if not within:
        inside = sampled(model, within_prompt=True, block_size=16)
        same_statistics(rows.statistics(within_prompt=True), inside)


def test_within_prompts_there_must_be_several_samples(model):
    with pytest.raises(CorrSteerError, match="within_prompt must be False where every prompt has one sample"):
        gather(model, within_prompt=True)


def test_the_extremes_of_a_feature_are_found_with_the_token_at_which_it_peaks(model, kept):
    layer, tokenizer = 1, tiny_pipeline.tokenizer()
    feature = int(kept.moments[layer]["max"].frequency().sub(0.6).abs().argmin())
    highest, lowest = extremes(kept, layer, feature, k=4)
    values = dict(kept.activations.of_feature(layer, "max", feature))
    assert [one.activation for one in highest] == sorted(values.values(), reverse=True)[:4]
    assert [one.activation for one in lowest] == sorted(values.values())[:4]
    assert not {one.sample for one in highest} & {one.sample for one in lowest}
    encoder = tiny_pipeline.encoders()[layer]
    for one in with_peaks(kept, model, tokenizer, encoder, layer, feature, [*highest, *lowest]):
        assert "".join(text for text, _ in one.tokens) == tokenizer.decode(
            [*one.rollout.prompt_ids, *one.rollout.completion_ids]
        )
        seen = [value for _, value in one.tokens if value is not None]
        assert max(seen) == pytest.approx(one.activation, rel=1e-4, abs=1e-6)
        assert len(seen) == max(len(one.rollout.completion_ids), 1), "from the last prompt token to the last but one"
        if one.activation == 0:
            assert one.peak is None
            continue
        assert one.peak.activation == pytest.approx(one.activation, rel=1e-4)
        whole = one.peak.before + one.peak.token + one.peak.after
        assert whole == tokenizer.decode([*one.rollout.prompt_ids, *one.rollout.completion_ids])
    with pytest.raises(CorrSteerError, match="feature must lie in 0..47, got 48"):
        extremes(kept, layer, 48)
    with pytest.raises(CorrSteerError, match="layer must be one of 1, 2, got 7"):
        extremes(kept, 7, 0)


def test_every_figure_of_an_outside_file_is_what_its_lines_say(model, tmp_path):
    """Three completions from elsewhere, text alone, and the published accumulators computed by the definition."""
    rows = [
        {"prompt": "1+1=", "completion": "2", "reward": 1.0, "topic": "easy"},
        {"prompt": "12+3=", "completion": "16", "reward": 0.0},
        {"prompt": "7+5=", "completion": "", "reward": 0.5},
        {"prompt": "2+2=", "completion": "4444", "reward": 1.0},
    ]
    path = tmp_path / "outside.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rollouts = read_rollouts(path)
    assert rollouts[0].meta == {"topic": "easy"}
    run = gather(model, rollouts=rollouts, permutations=0, bootstrap=0)
    tokenizer = tiny_pipeline.tokenizer()
    for layer, encoder in tiny_pipeline.encoders().items():
        moments = Moments(encoder.d_sae)
        for row in rows:
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = prompt + tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                h = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]
            steps = max(1, len(ids) - len(prompt))
            z = (h @ encoder.weight.T + encoder.bias)[len(prompt) - 1 : len(prompt) - 1 + steps]
            z = torch.where((z > encoder.threshold) & (z > 0), z, 0).amax(0)
            from corrsteer import update_moments

            update_moments(z[None], torch.tensor([row["reward"]]), moments)
        same_state(run.moments[layer]["max"], moments, 1e-5)
    assert run.rewards.tolist() == [1.0, 0.0, 0.5, 1.0] and run.provenance["engine"] == ["unknown"]


def test_completions_without_rewards_take_a_grader(model, tmp_path):
    path = tmp_path / "outside.jsonl"
    path.write_text('{"prompt": "1+1=", "completion": "2", "answer": 2}\n{"prompt": "1+2=", "completion": "4", '
                    '"answer": 3}\n', encoding="utf-8")  # fmt: skip
    rollouts = read_rollouts(path)
    with pytest.raises(CorrSteerError, match="rollouts must hold rewards, or the task a grader, but 2 of 2"):
        gather(model, rollouts=rollouts)
    run = gather(model, rollouts=rollouts, task=task_of(rollouts, "exact"), permutations=0, bootstrap=0)
    assert run.rewards.tolist() == [1.0, 0.0]
    with pytest.raises(CorrSteerError, match="task must have an example for each of the rollouts, 2, got 40"):
        gather(model, rollouts=rollouts, task=tiny_pipeline.task())


def test_text_that_its_tokens_do_not_decode_to_is_reported(model):
    class Lossy:
        """A tokenizer that reads lower case alone."""

        def __init__(self, inner):
            self._inner = inner

        def __call__(self, text, **options):
            lower = text.replace("5", "6") if isinstance(text, str) else [t.replace("5", "6") for t in text]
            return self._inner(lower, **options)

        def __getattr__(self, name):
            return getattr(self._inner, name)

    rows = [{"prompt": "1+1=", "completion": "25", "reward": 1}, {"prompt": "1+2=", "completion": "4", "reward": 0}]
    task = Task.from_rows(rows, None, answer_field=None)
    assert len(task) == 2
    from corrsteer.rollouts.rollout import Rollout

    rollouts = [Rollout.from_row({"id": str(i), **row}) for i, row in enumerate(rows)]
    run = collect(
        model, Lossy(tiny_pipeline.tokenizer()), tiny_pipeline.encoders(), rollouts=rollouts, permutations=0,
        progress=False,
    )  # fmt: skip
    assert "the tokens of 1 of 2 completions do not decode to their text, such as that of '0'" in run.notes[0]


def test_tokens_that_the_model_does_not_know_and_completions_that_are_too_long_are_named_with_their_line(
    model, tmp_path
):
    path = tmp_path / "outside.jsonl"
    good = {"prompt_ids": [3, 4], "completion_ids": [5], "reward": 1}
    for bad, message in (
        ({"completion_ids": [5, 10**6]}, "outside.jsonl:2: completion_ids has token 1000000, but the model knows"),
        ({"prompt_ids": [4] * 10_000}, "outside.jsonl:2: .*10001 tokens, more than"),
    ):
        path.write_text(json.dumps(good) + "\n" + json.dumps(good | bad) + "\n", encoding="utf-8")
        with pytest.raises(CorrSteerError, match=message):
            gather(model, rollouts=read_rollouts(path))


def test_the_columns_of_all_layers_are_let_go_of_once_features_are_tested(model):
    run = gather(model)
    before = run.significance()
    assert not any("_columns" in vars(run.evidence[layer]["max"].rows) for layer in run.points)
    again = run.statistics().significance()
    assert all(torch.equal(before[layer].p, again[layer].p) for layer in run.points)
