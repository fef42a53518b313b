"""Trials give what each steering gives alone, and read prompts once."""

import contextlib
import dataclasses
import time

import architectures
import pytest
import tiny_pipeline
import torch

from corrsteer import CorrSteerError, Decoding, HookPoint, Steering, Task, Trial, evaluate, run_trials
from corrsteer.experiments.trials import UNSTEERED
from corrsteer.lm import batches, generation, hook_points
from corrsteer.lm.generation import Generator
from corrsteer.rollouts.grading import grade

N = 8
LENGTHS = (2, 14, 4, 9, 2, 6)  # of prompts, some longer than the windows' 5 and some shorter

# One with states beside attention, one with a window in every layer, one with states alone.
ARCHITECTURES = (
    "llama", "gemma2", "gemma3_text", "mistral", "qwen3", "gpt2", "gpt_neox", "phi3", "bloom", "deepseek_v3", "bamba",
    "qwen3_next", "mamba",
)  # fmt: skip


class Tokens:
    """A tokenizer of prompts that are numbers, and of completions too."""

    pad_token_id, eos_token_id = 0, None

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]


def task(lengths=LENGTHS, head=()):
    generator = torch.Generator().manual_seed(0)
    prompts = [[*head, *torch.randint(3, 61, (n,), generator=generator).tolist()] for n in lengths]
    return Task.from_rows(
        [{"prompt": " ".join(map(str, prompt))} for prompt in prompts],
        grader=lambda completion, example: float(len(completion) % 3), answer_field=None,
    )  # fmt: skip


def steering(model, layers, seed=0, size=3.0):
    generator, d = torch.Generator().manual_seed(seed), hook_points.width(model)
    return Steering.from_vectors(
        {f"blocks.{at}.hook_resid_post": size * torch.randn(d, generator=generator) for at in layers}
    )


def alone(model, task, trial, decoding):
    """A trial's completions under `Steering.apply`, one prompt at a time."""
    decoding = dataclasses.replace(decoding, batch_size=1)
    applied = trial.steering.apply(model, trial.positions, trial.scale) if trial.steering else contextlib.nullcontext()
    with applied:
        return grade(model, Tokens(), task, decoding, progress=False)


def stop_somewhere(model, task, trials, decoding):
    """Give the model stop tokens at which completions end at different times."""
    written = [completion.split() for t in trials for completion in alone(model, task, t, decoding).completions]
    ends = lambda token: len({row.index(token) for row in written if token in row})  # noqa: E731
    stop = max({token for row in written for token in row}, key=lambda token: (ends(token), token))
    model.generation_config.eos_token_id = int(stop)


@pytest.fixture
def cuts_early(monkeypatch):
    monkeypatch.setattr(batches, "PASS", 0)
    monkeypatch.setattr(generation, "PASS", 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_is_that_of_the_same_row_steered_alone(architecture, cuts_early):
    model, decoding = architectures.build(architecture), Decoding(max_new_tokens=N, batch_size=7)
    one, several = steering(model, (1,)), steering(model, (0, 2, 3), seed=1, size=1.0)
    trials = [
        Trial(), Trial(one), Trial(several, 0.5), Trial(one, -1.0), Trial(several, positions="all"),
        Trial(one, positions="all"), Trial(several, positions="prompt"), Trial(one, 2.0, "prompt"), Trial(one, 0.0),
    ]  # fmt: skip
    stop_somewhere(model, task(), trials, decoding)
    expected = [alone(model, task(), trial, decoding) for trial in trials]
    results = run_trials(model, Tokens(), task(), trials, decoding, progress=False)
    for result, reference in zip(results, expected):
        assert result.completions == reference.completions
        assert result.rewards == reference.rewards
    assert len({tuple(result.completions) for result in results[:8]}) == 8, "each steers in its own way"
    lengths = {len(completion.split()) for result in results for completion in result.completions}
    assert len(lengths) > 2, "rows stop at different times"


@pytest.mark.parametrize("head", [(), (5, 9, 17, 33, 21, 8, 40)], ids=["nothing shared", "a prefix shared"])
@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_prompts_are_read_once_for_all_trials(batch_size, head, cuts_early):
    model, decoding = architectures.build("llama"), Decoding(max_new_tokens=1, batch_size=batch_size)
    trials = [UNSTEERED] + [Trial(steering(model, (1,), seed)) for seed in range(5)]
    prompts = task(head=head)
    expected = [alone(model, prompts, trial, decoding).completions for trial in trials]
    assert Generator(model, Tokens(), decoding).reuse.rows
    seen = []
    handle = hook_points.attach(model, HookPoint(0), lambda h: seen.append(tuple(h.shape[:2])))
    results = run_trials(model, Tokens(), prompts, trials, decoding, progress=False)
    handle.remove()
    assert [result.completions for result in results] == expected
    if head and batch_size == 1:  # otherwise some are read like a decode step
        assert sum(rows for rows, columns in seen if columns > len(head)) == 6, "each prompt once"
    steps = [rows for rows, columns in seen if columns == 1]
    if batch_size == 256 and not head:
        assert seen == [(6, 13), (36, 1)], "one prefill, then one token of every trial's every row"
    if batch_size == 256 and head:
        assert seen == [(1, 7), (6, 13), (36, 1)]
    assert sum(steps) >= 36 and max(steps) <= batch_size


def test_a_prompt_of_one_token_is_steered_as_alone():
    model, decoding = architectures.build("bamba"), Decoding(max_new_tokens=3)
    trials = [UNSTEERED, Trial(steering(model, (1,))), Trial(steering(model, (2,)))]
    for lengths in ((1, 5, 1, 3), (1, 1)):
        results = run_trials(model, Tokens(), task(lengths), trials, decoding, progress=False)
        for trial, result in zip(trials, results):
            assert result.completions == alone(model, task(lengths), trial, decoding).completions


def test_rows_of_a_batch_of_trials_fit_in_the_cache_they_may_take():
    model = architectures.build("llama")
    trials = [Trial(steering(model, (1,), seed)) for seed in range(5)]
    assert Generator(model, Tokens(), Decoding()).reuse.rows
    row = 2 * 4 * 2 * 8 * 4 * (14 + 3)  # keys and values, layers, heads, their width, float32, tokens
    seen = []
    handle = hook_points.attach(model, HookPoint(0), lambda h: seen.append(tuple(h.shape[:2])))
    for budget, most in ((1, 1), (4 * row, 4), (100 * row, 30)):
        seen.clear()
        run_trials(model, Tokens(), task(), trials, Decoding(max_new_tokens=3, cache_bytes=budget), progress=False)
        assert max(rows for rows, columns in seen if columns == 1) == most
    handle.remove()


def test_sampled_trials_are_paired():
    """A trial that steers next to nothing draws what no steering draws, at every place in every batch."""
    model, decoding = architectures.build("llama"), Decoding(max_new_tokens=N, temperature=1.0, batch_size=5)
    small = steering(model, (1, 2), size=1e-6)
    trials = [Trial(), Trial(small), Trial(small, positions="all"), Trial(steering(model, (1,)))]
    plain, near, everywhere, far = run_trials(model, Tokens(), task(), trials, decoding, progress=False)
    assert plain.completions == near.completions == everywhere.completions != far.completions
    assert len(set(plain.completions)) == len(LENGTHS)
    again = run_trials(model, Tokens(), task(), trials[3:], dataclasses.replace(decoding, batch_size=2), progress=False)
    assert again[0].completions == far.completions


def test_in_bfloat16_trials_differ_from_steering_alone_no_more_than_batches_do():
    model, decoding = architectures.build("llama").bfloat16(), Decoding(max_new_tokens=4)
    trials = [Trial(steering(model, (at,), seed)) for at in range(3) for seed in range(4)]
    prompts = task(LENGTHS * 4)
    same = {"trials": 0, "batches": 0}
    for trial, result in zip(trials, run_trials(model, Tokens(), prompts, trials, decoding, progress=False)):
        reference = alone(model, prompts, trial, decoding).completions
        with trial.steering.apply(model):
            batched = grade(model, Tokens(), prompts, decoding, progress=False).completions
        for name, completions in (("trials", result.completions), ("batches", batched)):
            same[name] += sum(a == b for a, b in zip(completions, reference))
    total = len(trials) * len(prompts)
    assert same["trials"] > 0.9 * total and same["trials"] > same["batches"] - 0.05 * total


def test_bad_trials_are_refused_before_anything_is_generated():
    model = architectures.build("llama")
    fits = steering(model, (1,))
    for trials, message in (
        ([], "trials must be one or more, got none"),
        ([fits], "each of trials must be a Trial, got Steering"),
        ([Trial(), Trial(steering(model, (9,)))], "outside the model, whose layers are 0..3"),
        ([Trial(Steering.from_vectors({"blocks.1.hook_resid_post": torch.ones(3)}))], "width 3"),
        ([Trial(fits, 1e39)], "scale must leave what is added finite in float32, got 1e"),
    ):
        with pytest.raises(CorrSteerError, match=message):
            run_trials(model, None, task(), trials, progress=False)
    for options, message in (
        ({"steering": "x"}, "steering must be a Steering, got 'x'"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"positions": "some"}, "positions must be one of generated, all, prompt, got 'some'"),
    ):
        with pytest.raises(CorrSteerError, match=message):
            Trial(**options)


def test_trials_can_be_compared_and_kept_in_sets():
    one = Trial(steering(architectures.build("llama"), (1,)))
    assert one == one != Trial() and len({one, UNSTEERED}) == 2


def test_steering_whole_prompts_alone_plans_no_shared_prefixes():
    model = architectures.build("llama")
    prompts = [rest for head in ([5] * 20, [9] * 20) for rest in (head + [11], head + [12, 13], head + [14])]
    rows = [{"prompt": " ".join(map(str, prompt))} for prompt in prompts * 4]
    whole = Task.from_rows(rows, grader=lambda completion, example: 0.0, answer_field=None)
    seen = []
    handle = hook_points.attach(model, HookPoint(0), lambda h: seen.append(tuple(h.shape[:2])))
    run_trials(model, Tokens(), whole, [Trial(steering(model, (1,)), positions="all")], Decoding(1), progress=False)
    handle.remove()
    assert seen == [(24, 22)]


def test_progress_shows_completions_and_the_leader(capsys):
    model = tiny_pipeline.model()
    trials = [UNSTEERED, Trial(steering(model, (1,)), name="layer 1")]
    results = run_trials(model, tiny_pipeline.tokenizer(), tiny_pipeline.task(10), trials, Decoding(2), progress=True)
    shown = capsys.readouterr().err
    best = max(zip(trials, results), key=lambda pair: pair[1].score)
    assert "20/20" in shown and f"{best[0].name} {best[1].score:.3f}" in shown


@pytest.mark.parametrize("batch_size", (1, 4, 64))
def test_tokens_and_seconds_of_trials_add_up_to_what_was_generated(batch_size):
    """Whether rows are written one at a time, with others of their trial, or with those of all trials."""
    model, decoding = architectures.build("llama"), Decoding(N, batch_size=batch_size)
    trials = [UNSTEERED, Trial(steering(model, (1,))), Trial(steering(model, (0, 2)), positions="all")]
    stop_somewhere(model, task(), trials, decoding)
    stop = str(model.generation_config.eos_token_id)
    started = time.perf_counter()
    results = run_trials(model, Tokens(), task(), trials, decoding, progress=False)
    whole = time.perf_counter() - started
    for trial, result in zip(trials, results):
        lengths = [len(completion.split()) for completion in result.completions]
        assert result.tokens == sum(min(length + 1, N) for length in lengths) > sum(lengths)
        assert stop not in " ".join(result.completions).split()
        assert result.tokens == alone(model, task(), trial, decoding).tokens
        assert result.tokens_per_second == result.tokens / result.seconds
    assert 0.1 * whole < sum(result.seconds for result in results) < whole


def test_trials_whose_rows_share_batches_share_the_time_by_their_tokens():
    model = architectures.build("llama")
    trials = [UNSTEERED, Trial(steering(model, (1,)))]
    results = run_trials(model, Tokens(), task(head=[5] * 3), trials, Decoding(N), progress=False)
    assert results[0].tokens == results[1].tokens == N * len(LENGTHS)
    assert results[0].seconds == pytest.approx(results[1].seconds)


def test_several_steerings_are_evaluated_at_once_as_each_alone():
    model, tokenizer, decoding = tiny_pipeline.model(), tiny_pipeline.tokenizer(), Decoding(3)
    named = {"S": steering(model, (1,)), "A": steering(model, (1, 2), seed=3), "nothing": None}
    together = evaluate(model, tokenizer, tiny_pipeline.task(20), named, decoding=decoding, progress=False)
    assert list(together) == ["S", "A", "nothing"]
    for name, one in named.items():
        by_itself = evaluate(model, tokenizer, tiny_pipeline.task(20), one, decoding=decoding, progress=False)
        assert dataclasses.replace(together[name], p_holm=together[name].p_value) == by_itself
    assert together["nothing"].steered == together["S"].unsteered != together["S"].steered
    with pytest.raises(CorrSteerError, match="steering must be one or more, got an empty mapping"):
        evaluate(model, tokenizer, tiny_pipeline.task(20), {}, progress=False)
