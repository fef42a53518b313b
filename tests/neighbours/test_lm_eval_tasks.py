"""Tasks of lm-evaluation-harness: prompts and rewards against what the harness itself asks and scores; no hub."""

import json

import pytest
import yaml

pytest.importorskip("lm_eval")

from lm_eval.api.model import LM  # noqa: E402
from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from corrsteer import demo  # noqa: E402
from corrsteer.cli import app  # noqa: E402
from corrsteer.integrations.lm_eval_tasks import load_lm_eval  # noqa: E402
from corrsteer.tasks import TaskError  # noqa: E402

SUMS = {
    "task": "tiny_sums",
    "output_type": "generate_until",
    "training_split": "train",
    "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "description": "Add.\n\n",
    "num_fewshot": 2,
    "generation_kwargs": {"until": ["Question:", "\n\n"], "do_sample": False},
    "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "regexes_to_ignore": ["(?s).*#### "]}
    ],
    "filter_list": [
        {
            "name": "strict",
            "filter": [{"function": "regex", "regex_pattern": "#### (\\-?[0-9]+)"}, {"function": "take_first"}],
        },
        {
            "name": "flexible",
            "filter": [
                {"function": "regex", "group_select": -1, "regex_pattern": "(-?[0-9]+)"},
                {"function": "take_first"},
            ],
        },
    ],
    "metadata": {"version": 3.0},
}  # fmt: skip
COLOURS = {
    "task": "tiny_colours",
    "output_type": "multiple_choice",
    "training_split": "train",
    "validation_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "label",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
LETTERED = COLOURS | {
    "task": "tiny_letters",
    "doc_to_text": "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nAnswer:",
    "doc_to_choice": ["A", "B"],
    "num_fewshot": 1,
}


@pytest.fixture
def task_file(tmp_path):
    """Writes a task's YAML and its documents, and gives the path."""

    def write(task, train, test):
        for name, docs in (("train", train), ("test", test)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
        path = tmp_path / f"{task['task']}.yaml"
        cache = {"data_files": files, "cache_dir": str(tmp_path / "cache")}
        path.write_text(yaml.safe_dump(task | {"dataset_path": "json", "dataset_kwargs": cache}))
        return str(path)

    return write


@pytest.fixture
def sums(task_file):
    train = [{"question": f"{a}+1?", "answer": f"add\n#### {a + 1}", "kind": "easy"} for a in range(6)]
    test = [{"question": f"{a}+2?", "answer": f"add\n#### {a + 2}", "kind": "hard"} for a in range(8)]
    return task_file(SUMS, train, test)


@pytest.fixture
def colours(task_file):
    def of(task=COLOURS):
        train = [{"question": f"q{a}?", "choices": ["red", "blue"], "label": a % 2} for a in range(5)]
        test = [{"question": f"t{a}?", "choices": [" red", "blue"], "label": (a + 1) % 2} for a in range(3)]
        return task_file(task, train, test)

    return of


class Scripted(LM):
    """What a model would be to the harness: it writes what the script says, and remembers what it was asked."""

    def __init__(self, script):
        super().__init__()
        self.script, self.asked = script, []

    def generate_until(self, requests, **_):
        self.asked += [request.args[0] for request in requests]
        cut = [self.script[at] for at in range(len(requests))]
        for at, request in enumerate(requests):
            for stop in request.args[1]["until"]:
                cut[at] = cut[at].split(stop)[0]
        return cut

    def loglikelihood(self, requests, **_):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


WRITTEN = [
    "add\n#### 2", "so 3", "#### 4\n\nQuestion: 1+1?\n#### 2", "nothing", "#### 7", "7 or 8 Question: 9", "", "#### 9",
]  # fmt: skip


@pytest.mark.parametrize("shots", (0, 2, 4))
def test_a_generating_task_asks_and_scores_as_the_harness_does(sums, shots):
    lm = Scripted(WRITTEN)
    theirs = simple_evaluate(
        lm, tasks=[sums], num_fewshot=shots, task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    task = load_lm_eval(f"lm-eval:{sums}", shots=shots)
    assert [example.prompt for example in task.examples] == lm.asked
    rewards = task.grade(WRITTEN, task.examples)
    scores = {name: sum(each[name] for each in rewards) / len(rewards) for name in rewards[0]}
    assert scores == {name: theirs["results"]["tiny_sums"][name] for name in scores} and len(scores) == 2
    assert 0 < scores["exact_match,strict"] < scores["exact_match,flexible"] < 1
    assert task.grader_name == "lm-eval:tiny_sums, version 3.0" and (task.name, len(task)) == ("tiny_sums", 8)


def test_options_after_the_name_say_which_split_and_how_many_examples(sums):
    task = load_lm_eval(f"lm-eval:{sums},split=train,shots=3", shots=0)
    assert len(task) == 6 and task.examples[0].source == "lm-eval:tiny_sums[train]:1"
    for example in task.examples:  # never with its own answer among the examples
        assert example.prompt.count("Question:") == 4
        assert example.prompt.count(f"Question: {example.fields['question']}") == 1
    assert [example.prompt for example in load_lm_eval(sums).examples] == [
        example.prompt for example in load_lm_eval(sums).examples
    ]


def test_another_grader_a_category_and_the_answers_are_the_tasks(sums):
    task = load_lm_eval(sums, grader={"number": "number", "length": "length"}, category_field="kind")
    assert task.examples[0].answer == "add\n#### 2" and task.category(task.examples[0]) == "hard"
    assert task.grade(["#### 2"], task.examples[:1]) == [{"number": 1.0, "length": 2.0}]


def test_choices_become_options_by_letter(colours):
    task = load_lm_eval(colours(), shots=1)
    assert task.grader_name == "choice" and [example.answer for example in task.examples] == ["B", "A", "B"]
    first, *_, last = task.examples[0].prompt.split("\n\n")
    assert last == "Question: t0?\nA. red\nB. blue\nAnswer:"
    assert first in {f"Question: q{a}?\nA. red\nB. blue\nAnswer: {'AB'[a % 2]}" for a in range(5)}
    assert task.rewards([" B", "the answer is A", "A"], task.examples) == [1, 1, 0]
    assert "test" not in task.examples[0].source  # it has none: the harness evaluates on its validation split


def test_options_that_the_task_has_by_letter_stay_as_they_are(colours):
    task = load_lm_eval(colours(LETTERED))
    assert [example.answer for example in task.examples] == ["B", "A", "B"]
    first, last = task.examples[0].prompt.split("\n\n")
    assert last == "t0?\nA.  red\nB. blue\nAnswer:" and first.endswith(("Answer: A", "Answer: B"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"output_type": "loglikelihood"}, "is of the kind loglikelihood, which scores given texts"),
        ({"doc_to_text": "label", "doc_to_target": "end"}, "choices in the middle of the prompt"),
        ({"unsafe_code": True}, "runs the code that a model writes"),
        ({"doc_to_target": "end"}, "the right option must be one of 2, got '.'"),
    ],
)
def test_a_task_that_no_completion_can_be_graded_by_says_why(task_file, changed, message):
    docs = [{"question": "q?", "choices": ["red", "blue"], "label": 1, "end": "."}]
    with pytest.raises(TaskError, match=message):
        load_lm_eval(task_file(COLOURS | changed, docs, docs))


def test_a_name_that_is_none_says_what_it_may_be(sums):
    with pytest.raises(TaskError, match="there is no task file nowhere.yaml"):
        load_lm_eval("lm-eval:nowhere.yaml")
    with pytest.raises(TaskError, match="split of task .* must be one of train, test, got 'validation'"):
        load_lm_eval(f"{sums},split=validation")
    for wrong in (",shot=1", ",shots=", ",shots=1,shots=2", ",5"):
        with pytest.raises(TaskError, match="with ,shots=N or ,split=NAME once each"):
            load_lm_eval(sums + wrong)
    with pytest.raises(TaskError, match="shots of task .* must be a whole number, got 'few'"):
        load_lm_eval(sums + ",shots=few")


def test_the_harness_own_names_are_known_and_near_ones_are_told():
    with pytest.raises(TaskError, match="has no task 'gsm8kk'; did you mean .*gsm8k"):
        load_lm_eval("lm-eval:gsm8kk")
    with pytest.raises(TaskError, match="task mmlu is a group"):
        load_lm_eval("lm-eval:mmlu")


def test_the_command_line_takes_a_task_of_the_harness(sums, tmp_path):
    model, tokenizer, _ = demo.load()
    model.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")

    def rewards(*more):
        task = ["--model", tmp_path / "model", "--task", f"lm-eval:{sums},shots=0", "--part", "all", "--limit", 3]
        out = ["--max-new-tokens", 2, "--out", tmp_path / "r.jsonl", "--force", "--json"]
        found = CliRunner().invoke(app, ["rollouts", *map(str, [*task, *out, *more])])
        assert found.exit_code == 0, found.output
        return set(json.loads(found.stdout)["rewards"])

    assert rewards() == {"exact_match,strict", "exact_match,flexible"}
    assert rewards("--grader", "exact") == {"reward"}
