"""Rollouts are graded again, by graders or from a file, and checked against a model's tokens."""

import json

import pytest
import tiny_pipeline

from corrsteer import Decoding
from corrsteer.rollouts.generate import generate_rollouts
from corrsteer.rollouts.regrading import join_rewards, regraded, task_of
from corrsteer.rollouts.rollout import Rollout, RolloutError, as_chat
from corrsteer.rollouts.tokens import check_tokens, fill_in
from corrsteer.tasks import TaskError, batched, with_shuffled_rewards

CHAT = ({"role": "system", "content": "s"}, {"role": "user", "content": "q"})


def rollout(id="a", **changes):
    given = {"prompt": "1+1=", "prompt_ids": None, "completion": "2", "completion_ids": None, "answer": "2"}
    return Rollout(id=id, **given | changes)


THREE = [rollout("a"), rollout("b", completion="3", meta={"k": 1}), rollout("c", completion="2.0")]


def test_regrading_gives_what_grading_while_generating_gave():
    graders = {"even": tiny_pipeline.digits_up, "length": lambda completion, example: len(completion)}
    task = tiny_pipeline.task(12, graders)
    model, tokenizer = tiny_pipeline.model(), tiny_pipeline.tokenizer()
    batches = generate_rollouts(model, tokenizer, task, Decoding(4), progress=False)
    made = [each for batch in batches for each in batch]
    assert regraded(made, graders) == made
    assert [each.rewards["reward"] for each in regraded(made, "exact")] == [
        float(each.completion == "1") for each in made
    ]


def test_graders_see_prompt_answer_and_meta_in_batches():
    seen = []

    @batched
    def grader(completions, examples):
        seen.append([(e.prompt, e.answer, e.fields, c) for c, e in zip(completions, examples)])
        return [{"x": 1.0, "n": len(c)} for c in completions]

    graded = regraded(THREE, grader, batch_size=2)
    assert [each.rewards for each in graded] == [{"x": 1, "n": 1}, {"x": 1, "n": 1}, {"x": 1, "n": 3}]
    assert list(map(len, seen)) == [2, 1] and seen[0][1] == ("1+1=", "2", {"k": 1}, "3")


def test_a_grader_that_fails_names_the_rollout():
    with pytest.raises(TaskError, match="rollout 'b': grader .* failed: ZeroDivisionError"):
        regraded(THREE, lambda completion, example: 1 / (completion != "3"))
    with pytest.raises(TaskError, match="rollout 'a': no answer, and grader exact needs one"):
        regraded([rollout(answer=None)], "exact")
    with pytest.raises(RolloutError, match="rollout 'a': the completion's text is not known"):
        regraded([rollout(completion=None, completion_ids=(1,))], "exact")


def test_a_task_of_rollouts_has_an_example_for_each():
    task = task_of(THREE, "number", name="again")
    assert len(task) == 3 and task.name == "again" and not task.chat
    assert task.rewards([each.completion for each in THREE], task.examples) == [1, 0, 1]
    shuffled = with_shuffled_rewards(task, [1.0, 2.0, 3.0])
    assert sorted(shuffled.rewards(["", "", ""], task.examples)) == [1, 2, 3]
    assert not task_of(THREE).grading
    chat = task_of([rollout(prompt=CHAT)], "exact")
    assert (chat.chat, chat.system, chat.examples[0].prompt) == (True, "s", "q")
    assert task_of([rollout(prompt=None, prompt_ids=(1,))]).examples[0].prompt == ""
    with pytest.raises(RolloutError, match="one or more, got none"):
        task_of([])


def test_a_system_message_in_parts_is_no_tasks_system():
    parts = [{"type": "text", "text": "Be brief."}]
    messages = ({"role": "system", "content": parts}, {"role": "user", "content": "1+1="})
    rollout = Rollout("a", messages, None, "2", None)
    task = task_of([rollout, Rollout("b", messages, None, "3", None)])
    assert task.chat and task.system is None and [example.prompt for example in task.examples] == ["1+1="] * 2


def test_a_prompt_whose_tokens_are_known_is_not_made_a_chat():
    text = Rollout("a", "1+1=", None, "2", None)
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1="})
    assert as_chat(text, "Be brief.").prompt == messages
    read = Rollout("a", "1+1=", (3, 4), "2", None)
    assert as_chat(read, "Be brief.") == read


def test_the_task_of_a_tasks_rollouts_asks_the_same():
    task = tiny_pipeline.task(6)
    batches = generate_rollouts(tiny_pipeline.model(), tiny_pipeline.tokenizer(), task, Decoding(2), progress=False)
    by_id = {each.id: each for batch in batches for each in batch}
    again = task_of([by_id[example.source] for example in task.examples], tiny_pipeline.digits_up, name=task.name)
    assert again.identity == task.identity and again.samples() == task.samples()


# Rewards from a file


def file(path, text):
    path.write_text(text)
    return path


def test_rewards_are_joined_by_id(tmp_path):
    graded = [each for each in regraded(THREE, {"correct": "number", "old": lambda c, e: 7})]
    csv = file(tmp_path / "r.csv", "quality,id,correct\n0.5,b,1\n1,a,0\n-2e1,c,0.25\n")
    joined = join_rewards(graded, csv)
    assert [list(each.rewards.items()) for each in joined] == [
        [("quality", 1), ("correct", 0), ("old", 7)],
        [("quality", 0.5), ("correct", 1), ("old", 7)],
        [("quality", -20), ("correct", 0.25), ("old", 7)],
    ]
    lines = [{"id": "c", "quality": -20, "correct": 0.25}, {"id": "a", "quality": 1, "correct": 0},
             {"id": "b", "quality": 0.5, "correct": 1}]  # fmt: skip
    jsonl = file(tmp_path / "r.jsonl", "\n".join(map(json.dumps, lines)))
    assert join_rewards(graded, jsonl) == joined
    assert [list(each.rewards) for each in join_rewards(THREE, csv, ["correct"])] == [["correct"]] * 3
    nested = file(tmp_path / "n.jsonl", "".join(each.to_line() for each in graded))
    assert join_rewards(THREE, nested) == graded, "a file of rollouts has rewards too"


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("r.csv", "id,x\na,1\nb,2\n", "must have rewards of every rollout, but has none of 'c'"),
        ("r.csv", "id,x\na,1\n", "none of 'b' and 1 more"),
        ("r.csv", "id,x\na,1\nb,2\nc,3\nd,4\n", "^r.csv:5: id 'd' is no rollout's"),
        ("r.csv", "id,x\na,1\na,2\nd,2\n", r"^r.csv:3: id 'a' was there before, in r.csv:2;.*\(and 1 more bad\)"),
        ("r.csv", "id,x\na,nan\n", "^r.csv:2: reward 'x' must be a finite number, got nan"),
        ("r.csv", "id,x\na,yes\n", "^r.csv:2: reward 'x' must be a finite number, got 'yes'"),
        ("r.csv", "id,x\na,\n", "^r.csv:2: reward 'x' must be a finite number, got ''"),
        ("r.csv", "id,x\na\n", "^r.csv:2: there must be 2 columns"),
        ("r.csv", "id,x\na,1,2\n", "^r.csv:2: there must be 2 columns"),
        ("r.csv", "id,x,x\na,1,2\n", "a column is there twice"),
        ("r.csv", "x\n1\n", "^r.csv:2: id must be text that is not empty, got None"),
        ("r.csv", "id\na\n", "^r.csv:2: there must be at least one reward beside the id"),
        ("r.csv", "", "r.csv has no rewards"),
        ("r.jsonl", '{"id": "a", "x": 1}\n{"id": "b", "y": 1}\n', "^r.jsonl:2: every line must have the same rewards"),
        ("r.jsonl", '{"id": "a", "x": true}\n', "^r.jsonl:1: reward 'x' must be a finite number, got True"),
        ("r.jsonl", '{"id": "a", "x"\n', "^r.jsonl:1: not JSON"),
        ("r.jsonl", "[1]\n", "^r.jsonl:1: a line must be an object with an id"),
    ],
)
def test_rewards_that_cannot_be_joined_are_reported_with_file_and_line(tmp_path, name, text, message):
    with pytest.raises(RolloutError, match=message):
        join_rewards(THREE, file(tmp_path / name, text))


def test_a_reward_that_is_asked_for_must_be_there(tmp_path):
    with pytest.raises(RolloutError, match="r.csv:2: there is no reward 'y' among x"):
        join_rewards(THREE, file(tmp_path / "r.csv", "id,x\na,1\n"), ["y"])


# Tokens


def test_tokens_that_the_model_does_not_know_are_refused_with_the_line():
    good = rollout("a", prompt_ids=(1, 2), completion_ids=(3,))
    check_tokens([good], vocabulary=4, context=3)
    check_tokens([rollout("b")], vocabulary=1)
    bad = [good, rollout("b", prompt_ids=(1, 4)), rollout("c", completion_ids=(9,), source="r.jsonl:3")]
    with pytest.raises(RolloutError, match=r"rollout 'b': prompt_ids has token 4, but the model knows 4.*\(and 1 more"):
        check_tokens(bad, vocabulary=4)
    with pytest.raises(RolloutError, match="r.jsonl:3: completion_ids has token 9"):
        check_tokens(bad[2:], vocabulary=4)
    with pytest.raises(
        RolloutError, match="rollout 'a': prompt and completion have 3 tokens, more than the context of 2"
    ):
        check_tokens([good], vocabulary=4, context=2)


def test_what_is_missing_is_filled_in_as_it_was_generated():
    model, tokenizer, task = tiny_pipeline.model(), tiny_pipeline.tokenizer(), tiny_pipeline.task(6)
    batches = generate_rollouts(model, tokenizer, task, Decoding(5, 1.0), progress=False)
    for made in (each for batch in batches for each in batch):
        if set(made.completion_ids) & set(tokenizer.all_special_ids):
            continue  # which are not in the text
        text = Rollout(made.id, made.prompt, None, made.completion, None)
        ids = Rollout(made.id, made.prompt, None, None, made.completion_ids)
        for (filled,) in (fill_in([text], tokenizer), fill_in([ids], tokenizer)):
            assert (filled.prompt_ids, filled.completion) == (made.prompt_ids, made.completion)
            assert filled.completion_ids == made.completion_ids  # a character is a token
        assert fill_in([made], tokenizer) == [made]


def test_completions_are_cut_at_the_first_stop_token():
    tokenizer = tiny_pipeline.tokenizer()
    stop = tokenizer.eos_token_id
    (filled,) = fill_in([rollout(completion=None, completion_ids=(8, 9, stop, 8))], tokenizer, [stop])
    assert filled.completion_ids == (8, 9) and filled.finish == "stop" and len(filled.completion) == 2


def test_messages_need_a_chat_template():
    with pytest.raises(RolloutError, match="rollout 'a': .*no chat_template; give prompt_ids"):
        fill_in([rollout(prompt=CHAT)], tiny_pipeline.tokenizer())
    tokenizer = tiny_pipeline.build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    with_digits = [{"role": "system", "content": "8"}, {"role": "user", "content": "1+2"}]
    (filled,) = fill_in([rollout(prompt=with_digits)], tokenizer)
    assert tokenizer.decode(list(filled.prompt_ids)) == "81+2="
