"""Rollouts are what the model writes under its decoding, each by its own seed, and graded as they come."""

import random
from dataclasses import replace

import pytest
import tiny_pipeline
import torch

from corrsteer import CorrSteerError, Decoding, Task
from corrsteer.lm.generation import Generator, tokenize
from corrsteer.rollouts.generate import generate_rollouts
from corrsteer.rollouts.grading import grade
from corrsteer.rollouts.rollout_file import read_rollouts
from corrsteer.tasks import TaskError

GREEDY, SAMPLED = Decoding(max_new_tokens=6), Decoding(max_new_tokens=6, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def model():
    return tiny_pipeline.model()


def made(model, task=None, decoding=GREEDY, **options):
    """Rollouts by id."""
    task = tiny_pipeline.task(12) if task is None else task
    batches = generate_rollouts(model, tiny_pipeline.tokenizer(), task, decoding, progress=False, **options)
    return {rollout.id: rollout for batch in batches for rollout in batch}


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED])
def test_rollouts_hold_the_completions_and_rewards_that_grade_gives(model, decoding):
    task = tiny_pipeline.task(12)
    rollouts = made(model, task, decoding)
    graded = grade(model, tiny_pipeline.tokenizer(), task, decoding, progress=False)
    assert list(graded.rewards_by_name) == ["reward"] and len(rollouts) == 12
    found = [rollouts[example.source] for example in task.examples]
    assert [each.completion for each in found] == graded.completions
    assert [each.rewards["reward"] for each in found] == graded.rewards
    assert all(each.prompt == example.prompt for each, example in zip(found, task.examples))
    assert sum(len(each.completion_ids) + (each.finish == "stop") for each in found) == graded.tokens


def test_token_ids_are_those_that_plain_generation_gives_up_to_the_first_stop_token(model):
    tokenizer = tiny_pipeline.tokenizer()
    stops = Generator(model, tokenizer, GREEDY).stops
    finishes = set()
    for rollout in made(model, tiny_pipeline.task(40), SAMPLED).values():
        finishes.add(rollout.finish)
        assert not set(stops) & set(rollout.completion_ids)
        assert (len(rollout.completion_ids) < 6) == (rollout.finish == "stop")
        assert tokenizer.decode(list(rollout.completion_ids), skip_special_tokens=True) == rollout.completion
    assert finishes == {"stop", "length"}
    for rollout in made(model).values():
        ids = torch.tensor([rollout.prompt_ids])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
        )[0, ids.shape[1] :].tolist()
        end = next((at for at, token in enumerate(out) if token in stops), None)
        assert list(rollout.completion_ids) == out[:end]
        assert rollout.finish == ("length" if end is None else "stop")


def test_what_a_sample_draws_depends_on_nothing_but_its_seed_its_prompt_and_its_number(model):
    one, several = made(model, decoding=SAMPLED), made(model, decoding=SAMPLED, samples_per_prompt=3)
    assert set(several) == {id + more for id in one for more in ("", "#1", "#2")}
    assert {id: several[id] for id in one} == one, "more samples leave the first as they are"
    small = replace(SAMPLED, batch_size=2)
    assert made(model, decoding=small, samples_per_prompt=3) == several, "nor do other batches change any"
    task = tiny_pipeline.task(12)
    turned = list(task.examples)
    random.Random(1).shuffle(turned)
    alone = {e.prompt: e for e in turned}  # of examples with one prompt, the order says which is the first
    turned = replace(task, examples=tuple(alone.values()))
    again = made(model, turned, SAMPLED, samples_per_prompt=3)
    shared = {id for id in again if sum(e.prompt == again[id].prompt for e in task.examples) == 1}
    assert len(shared) > 20 and all(again[id] == several[id] for id in shared)
    other = made(model, decoding=replace(SAMPLED, seed=4), samples_per_prompt=3)
    assert sum(other[id].completion != several[id].completion for id in several) > len(several) / 2
    assert sum(several[id + "#1"].completion != several[id].completion for id in one) > len(one) / 2


def test_the_file_is_in_the_tasks_order_and_the_same_whatever_the_batches(model, tmp_path):
    task = tiny_pipeline.task(12)
    for name, size in (("a", 3), ("b", 64)):
        decoding = replace(SAMPLED, batch_size=size)
        rollouts = made(model, task, decoding, samples_per_prompt=2, out=tmp_path / name)
        assert {each.id: each for each in read_rollouts(tmp_path / name)} == rollouts
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    ids = [each.id for each in read_rollouts(tmp_path / "a")]
    assert ids == [e.source + more for e in task.examples for more in ("", "#1")]


def test_a_batch_is_on_the_disk_when_it_is_given_and_the_same_call_goes_on(model, tmp_path):
    path = tmp_path / "r.jsonl"
    graded = []

    def asked(max_new_tokens=GREEDY.max_new_tokens, **settings):
        task = tiny_pipeline.task(12, lambda completion, example: graded.append(1) or 1.0)
        decoding = replace(GREEDY, batch_size=4, max_new_tokens=max_new_tokens)
        world = model, tiny_pipeline.tokenizer(), task, decoding
        return generate_rollouts(*world, out=path, progress=False, **settings)

    batches = asked()
    assert list(tmp_path.iterdir()) == [], "nothing is generated before it is asked for"
    first = next(batches)
    (kept,) = (tmp_path / "r.jsonl.partial").glob("*.jsonl")
    assert read_rollouts(kept) == first and 0 < len(first) <= 4
    batches.close()
    with pytest.raises(CorrSteerError, match="max_new_tokens was .*, is 2. Ask for the same to go on"):
        next(asked(max_new_tokens=2))
    again = list(asked())
    assert again[0] == first and len(graded) == 12, "none is made twice"
    assert {one.id: one for one in read_rollouts(path)} == {one.id: one for batch in again for one in batch}
    assert [item.name for item in tmp_path.iterdir()] == ["r.jsonl"]
    (whole,) = asked()
    assert whole == read_rollouts(path) and len(graded) == 12, "what is finished is given back"
    with pytest.raises(CorrSteerError, match="already there, with others"):
        asked(max_new_tokens=2)
    list(asked(max_new_tokens=2, replace_out=True))
    assert read_rollouts(path) != whole and len(graded) == 24


def test_a_grader_that_fails_leaves_the_batches_before_to_go_on_with(model, tmp_path):
    def grader(completion, example, seen=[]):  # noqa: B006
        seen.append(1)
        return float("nan") if len(seen) == 9 else 1.0

    with pytest.raises(TaskError, match="must return a finite number"):
        made(model, tiny_pipeline.task(12, grader), replace(GREEDY, batch_size=4), out=tmp_path / "r")
    kept = (tmp_path / "r.partial").glob("*.jsonl")
    assert sum(len(read_rollouts(path)) for path in kept) == 8


def test_a_task_without_a_grader_gives_rollouts_without_rewards(model, tmp_path):
    rows = [{"prompt": f"{n}+", "level": n} for n in range(3)]
    rollouts = made(model, Task.from_rows(rows, None, name="plain"), out=tmp_path / "r")
    assert [each.rewards for each in rollouts.values()] == [{}] * 3
    assert {each.id: each.meta for each in read_rollouts(tmp_path / "r")} == {
        f"plain:{n + 1}": {"level": n} for n in range(3)
    }


def test_every_reward_is_kept_and_the_default_is_first(model):
    graders = {"even": tiny_pipeline.digits_up, "length": lambda completion, example: len(completion)}
    rollouts = made(model, tiny_pipeline.task(5, graders).rewarded_by("length"))
    assert all(list(each.rewards) == ["length", "even"] for each in rollouts.values())
    assert all(each.rewards["length"] == len(each.completion) for each in rollouts.values())


def test_what_made_a_rollout_is_recorded(model):
    import transformers

    (rollout,) = made(model, tiny_pipeline.task(1), SAMPLED).values()
    assert rollout.engine == f"transformers {transformers.__version__}" and rollout.model is None
    assert rollout.decoding == {"max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "seed": 3}


def test_a_chat_tasks_prompt_is_its_messages_and_the_tokens_are_the_templates(model):
    tokenizer = tiny_pipeline.build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    task = Task.from_rows([{"prompt": "1+2", "answer": "3"}], name="t", chat=True, system="8")
    ((rollout,),) = generate_rollouts(model, tokenizer, task, GREEDY, progress=False)
    assert rollout.prompt == ({"role": "system", "content": "8"}, {"role": "user", "content": "1+2"})
    assert list(rollout.prompt_ids) == tokenize(model, tokenizer, task, GREEDY)[0]
    assert tokenizer.decode(list(rollout.prompt_ids)) == "81+2="


@pytest.mark.parametrize(
    "options, message",
    [
        ({"samples_per_prompt": 2}, "must be 1 at temperature 0, as greedy completions of a prompt are all the same"),
        ({"samples_per_prompt": 0, "decoding": SAMPLED}, "samples_per_prompt must be a whole number of at least 1"),
        ({"task": 3}, "task must be a Task"),
        ({"decoding": {}}, None),
    ],
)
def test_what_cannot_be_generated_is_refused_before_anything_is(model, options, message):
    if message is None:
        options, message = {"decoding": 3}, "decoding must be a Decoding"
    settings = {"task": tiny_pipeline.task(2), "decoding": GREEDY} | options
    with pytest.raises(CorrSteerError, match=message):
        generate_rollouts(model, tiny_pipeline.tokenizer(), settings.pop("task"), settings.pop("decoding"), **settings)


def test_a_file_that_is_there_is_refused_before_anything_is_generated(model, tmp_path):
    (tmp_path / "r").write_text("mine")
    with pytest.raises(CorrSteerError, match="already there"):
        generate_rollouts(model, tiny_pipeline.tokenizer(), tiny_pipeline.task(2), out=tmp_path / "r")
    assert (tmp_path / "r").read_text() == "mine"


def test_examples_of_one_source_are_refused(model):
    task = tiny_pipeline.task(2)
    with pytest.raises(CorrSteerError, match="a source of its own, got 'untrained:1' twice"):
        made(model, replace(task, examples=(task.examples[0],) * 2))


def stopping(n):
    """A task whose grader is interrupted at the n-th completion, and how many it has seen."""
    seen = []

    def grader(completion, example):
        seen.append(1)
        if len(seen) == n:
            raise KeyboardInterrupt
        return tiny_pipeline.digits_up(completion, example)

    return tiny_pipeline.task(12, grader), seen


def test_rollouts_that_take_the_place_of_others_are_gone_on_with_too(model, tmp_path):
    out, decoding = tmp_path / "r.jsonl", Decoding(max_new_tokens=6, batch_size=4)
    made(model, decoding=Decoding(max_new_tokens=2), out=out)
    before = out.read_bytes()
    task, _ = stopping(9)
    with pytest.raises(KeyboardInterrupt):
        made(model, task, decoding, out=out, replace_out=True)
    assert out.read_bytes() == before
    task, seen = stopping(0)
    assert len(made(model, task, decoding, out=out)) == 12 and len(seen) == 4
    assert out.read_bytes() != before and [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


def test_a_process_that_comes_when_others_have_finished_reads_what_they_made(model, tmp_path):
    task, seen = stopping(0)
    late = generate_rollouts(model, tiny_pipeline.tokenizer(), task, GREEDY, out=tmp_path / "r", progress=False)
    first = made(model, task, out=tmp_path / "r")
    assert {rollout.id: rollout for batch in late for rollout in batch} == first and len(seen) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
