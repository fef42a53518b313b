import dataclasses
import json
import math
import re
import subprocess
import sys
from functools import partial

import pytest

from corrsteer import CorrSteerError
from corrsteer.tasks import Example, Grading, Task, TaskError, graders


def example(answer=None):
    return Example("a prompt", answer, {}, "train.jsonl:12")


def rows(n):
    return [{"prompt": f"prompt {i}", "answer": str(i)} for i in range(n)]


def write_lines(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def half(completion, example):
    return 0.5


not_a_grader = 3


# Graders: (completion, answer, reward)

EXACT = [
    ("Paris", "Paris", 1),
    ("  Paris\n", " Paris ", 1),
    ("\nParis\nQuestion: and of Spain?", "Paris", 1),
    ("one\ntwo", "one\ntwo", 1),
    ("paris", "Paris", 0),
    ("Paris, France", "Paris", 0),
    ("Rome\nParis", "Paris", 0),
    ("", "Paris", 0),
    ("no", ("No", "no"), 1),
    ("nope", ("No", "no"), 0),
]
CONTAINS = [
    ("It is PARIS, of course", "paris", 1),
    ("It is Rome", "Paris", 0),
    ("the big apple", ("New York", "Big Apple"), 1),
]
REGEX = [
    (" yes, it is", "^yes", 1),
    ("oh yes", "^yes", 0),
    ("YES", "(?i)yes", 1),
]
NUMBER = [
    ("42", "42", 1),
    ("The total is $1,200.00.", "1200", 1),
    ("3 + 4 = 7", "7", 1),
    ("7 and then 8", "7", 0),
    ("about 50%.", "50", 1),
    ("it fell to -3.5 degrees", "-3.5", 1),
    ("it fell to 3.5 degrees", "-3.5", 0),
    ("10-3", "3", 1),
    ("a debt of -$5", "-5", 1),
    ("−5", "-5", 1),
    (".5", "0.50", 1),
    ("1,2,3", "3", 1),
    ("1e3", "1000", 1),
    ("0.1", "0.10000000000000000001", 0),
    ("6 * 7\n#### 42\nQuestion: what is 5 + 5? 10", "42", 1),
    ("#### 41 but perhaps 42", "42", 0),
    ("#### none, so 42", "42", 1),
    ("42", "He has 6 * 7 = 40 + 2.\n#### 42", 1),
    ("no idea", "42", 0),
]
CHOICE = [
    ("B", "B", 1),
    (" b", "B", 1),
    ("(B)", "B", 1),
    ("B.", "(B)", 1),
    ("B. Paris", "B", 1),
    ("B) Paris", "B", 1),
    ("B because it is", "B", 1),
    ("**B**", "B", 1),
    ("Answer: B", "B", 1),
    ("**Answer:** B", "B", 1),
    ("The answer is B", "B", 1),
    ("the answer is (b), since", "B", 1),
    ("The correct answer is: option B.", "B", 1),
    ("The answer is A. No, the answer is B.", "B", 1),
    ("A dog is a mammal, so the answer is B", "B", 1),
    ("A dog is a mammal, so the answer is B", "A", 0),
    ("A dog is a mammal, which makes it (B).", "B", 1),
    ("I think it is C.", "C", 1),
    ("The answer is a mammal: (B)", "B", 1),
    ("The answer is a mammal: (B)", "A", 0),
    ("The answer is a", "A", 1),
    ("A because it is", "A", 1),
    ("I'm not sure", "I", 0),
    ("B\n\nQuestion: another?\nAnswer: C", "B", 1),
    ("A is wrong. B is wrong too. (C)", "C", 1),
    ("Born in the U.S.", "S", 0),
    ("Bananas", "B", 0),
    ("none of them", "B", 0),
    ("", "B", 0),
    ("2", "2", 1),
    ("Answer: 2 (B)", "2", 1),
    ("Answer: 2.5", "2", 0),
    ("Answer: 12", "1", 0),
    ("(D)", ("C", "D"), 1),
]
TABLES = {"exact": EXACT, "contains": CONTAINS, "regex": REGEX, "number": NUMBER, "choice": CHOICE}


@pytest.mark.parametrize(
    "name, completion, answer, reward", [(name, *case) for name, table in TABLES.items() for case in table]
)
def test_a_named_grader_rewards_what_its_table_says(name, completion, answer, reward):
    resolved, grader, needs_answer = graders.resolve(name)
    assert (resolved, needs_answer) == (name, True)
    assert grader(completion, example(answer)) == reward


def test_a_fixed_pattern_needs_no_answer():
    name, grader, needs_answer = graders.resolve("regex:^yes")
    assert (name, needs_answer) == ("regex:^yes", False)
    assert grader(" yes", example()) == 1.0
    assert grader("oh yes", example()) == 0.0


@pytest.mark.parametrize("given", [f"{__name__}:half", half])
def test_a_function_may_grade_by_name_or_as_it_is(given):
    assert graders.resolve(given) == (f"{__name__}:half", half, False)


def test_a_callable_without_a_name_of_its_own_is_named_by_its_type():
    assert graders.resolve(partial(half))[0] == "functools:partial"


@pytest.mark.parametrize(
    "given, message",
    [
        ("exactly", "one of exact, choice, .*length, regex:PATTERN or module:function, or refusal, .*got 'exactly'"),
        ("refusal", r"has a model, so give Task the grader.*named_grader\('refusal'\); --grader takes the name"),
        ("judge:http://localhost/v1,model=m", "has a model"),
        ("no_such_module:score", "PYTHONPATH.*No module named 'no_such_module'"),
        (":score", "cannot be imported"),
        (f"{__name__}:no_such_function", "has no attribute 'no_such_function'"),
        (f"{__name__}:not_a_grader", "must be callable, got int"),
        ("regex:(", r"pattern '\(' is invalid"),
        ("regex:", "empty"),
        (3, "a name or a callable, got int"),
    ],
)
def test_a_grader_that_cannot_be_found_is_reported(given, message):
    with pytest.raises(TaskError, match=message):
        graders.resolve(given)


@pytest.mark.parametrize(
    "grader, answer, message",
    [
        ("number", "forty", "needs a number in the answer, got 'forty'"),
        ("number", ["1", "2"], "takes one answer, got 2"),
        ("regex", "(", r"pattern '\(' is invalid"),
        ("regex", "", "empty"),
        ("choice", "Paris", "needs a label.*got 'Paris'"),
        ("choice", ["A", "Paris"], "needs a label.*got 'Paris'"),
        ("contains", " ", "empty"),
    ],
)
def test_an_answer_that_could_never_be_graded_is_reported_when_read(grader, answer, message):
    good = {"prompt": "p", "answer": "1"}
    with pytest.raises(TaskError, match="task:2: .*" + message):
        Task.from_rows([good, {"prompt": "p", "answer": answer}], grader)


# Grading through a task


def graded(grader):
    return Task("task", (example(),), Grading.of(grader, "mine")).reward("completion", example())


@pytest.mark.parametrize("returned, reward", [(True, 1.0), (2, 2.0), (-0.5, -0.5)])
def test_a_grade_is_a_float(returned, reward):
    result = graded(lambda completion, example: returned)
    assert result == reward and type(result) is float


def test_a_grade_may_be_a_numpy_scalar():
    import numpy

    assert graded(lambda completion, example: numpy.bool_(True)) == 1.0


@pytest.mark.parametrize("returned", [None, "1", float("nan"), float("inf"), 1j])
def test_a_grade_that_is_no_finite_number_is_reported(returned):
    with pytest.raises(TaskError, match=r"train.jsonl:12: grader mine must return a finite number, got .*\w"):
        graded(lambda completion, example: returned)


def test_a_grader_that_raises_is_reported_with_the_example_in_one_line():
    def broken(completion, example):
        raise KeyError("line one\nline two")

    with pytest.raises(TaskError, match="train.jsonl:12: grader mine failed: KeyError.*line two") as caught:
        graded(broken)
    assert "\n" not in str(caught.value)


def test_a_named_grader_without_an_answer_is_reported():
    with pytest.raises(TaskError, match="train.jsonl:12: grader mine failed: the example has no answer"):
        graded(graders.exact)


# Reading JSONL


def test_a_jsonl_file_becomes_examples_that_know_their_line(tmp_path):
    path = write_lines(
        tmp_path / "train.jsonl",
        b"\xef\xbb\xbf" + b'{"prompt": "6 * 7 =", "answer": 42, "level": ["easy"]}\r',
        "",
        '{"prompt": "caf\u00e9\u2028", "answer": ["a", 2]}',
        '{"prompt": "p", "answer": ["only"]}',
    )
    task = Task.from_jsonl(path)
    assert task.examples == (
        Example("6 * 7 =", "42", {"level": ["easy"]}, "train.jsonl:1"),
        Example("caf\u00e9\u2028", ("a", "2"), {}, "train.jsonl:3"),
        Example("p", "only", {}, "train.jsonl:4"),
    )
    assert (task.name, task.grader_name, len(task)) == ("train", "exact", 3)
    assert task.reward("42", task.examples[0]) == 1.0


GOOD = '{"prompt": "p", "answer": "a"}'


@pytest.mark.parametrize(
    "line, message",
    [
        ("{prompt: 1}", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["p", "a"]', "must be an object with named fields, got list"),
        ('{"question": "p", "answer": "a"}', "no field 'prompt' among question, answer: set prompt_field"),
        ('{"prompt": 3, "answer": "a"}', "field 'prompt', must be a non-empty string, got 3"),
        ('{"prompt": " ", "answer": "a"}', "must be a non-empty string"),
        ('{"prompt": "p", "label": "a"}', "no answer: field 'answer' is missing.*: set answer_field"),
        ('{"prompt": "p", "answer": null}', "no answer"),
        ('{"prompt": "p", "answer": {"text": "a"}}', "must be a string, a number or a list of these"),
        ('{"prompt": "p", "answer": []}', "must be a string, a number or a list of these"),
        ('{"prompt": "p", "answer": true}', "must be a string, a number or a list of these"),
        (b'{"prompt": "\xff"}', "not UTF-8: byte 0xff at position 12"),
    ],
)
def test_a_bad_line_is_reported_with_file_and_line(tmp_path, line, message):
    path = write_lines(tmp_path / "train.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(TaskError, match=f"^train.jsonl:3: .*{message}") as caught:
        Task.from_jsonl(path)
    assert "\n" not in str(caught.value)


def test_of_several_bad_lines_the_first_is_reported_and_the_rest_counted(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", GOOD, "{", GOOD, "[]", "{}")
    with pytest.raises(TaskError, match=r"^train.jsonl:2: not JSON.* \(and 2 more bad\)$"):
        Task.from_jsonl(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_examples_is_reported(tmp_path, content):
    with pytest.raises(TaskError, match="train.jsonl has no examples"):
        Task.from_jsonl(write_lines(tmp_path / "train.jsonl", content))


def test_a_file_that_cannot_be_read_is_reported(tmp_path):
    with pytest.raises(TaskError, match="cannot read .*missing.jsonl: No such file"):
        Task.from_jsonl(tmp_path / "missing.jsonl")
    with pytest.raises(TaskError, match="cannot read .*: Is a directory"):
        Task.from_jsonl(tmp_path)


def test_an_answer_is_optional_where_the_grader_needs_none():
    task = Task.from_rows([{"prompt": "p"}, {"prompt": "q", "answer": {"text": "a"}}], half, answer_field=None)
    assert [(e.answer, e.fields) for e in task.examples] == [(None, {}), (None, {"answer": {"text": "a"}})]
    assert Task.from_rows([{"prompt": "p"}], "regex:^yes").examples[0].answer is None


def test_a_grader_that_needs_an_answer_refuses_answer_field_none():
    with pytest.raises(TaskError, match="answer_field must name"):
        Task.from_rows(rows(1), answer_field=None)


def test_rows_may_name_their_fields_and_their_source():
    task = Task.from_rows(
        [{"question": "2 + 2?", "gold": 4}],
        "number",
        "sums",
        prompt_field="question",
        answer_field="gold",
        source="table",
    )
    assert task.examples == (Example("2 + 2?", "4", {}, "table:1"),)


def test_rows_may_name_a_category(tmp_path):
    rows = [{"prompt": "p", "answer": "a", "subject": "law"}, {"prompt": "q", "answer": "b", "subject": 7}]
    path = write_lines(tmp_path / "t.jsonl", *map(json.dumps, rows))
    for task in (
        Task.from_rows(rows, category_field="subject"),
        Task.from_jsonl(path, category_field="subject"),
        Task.from_dataset(rows, category_field="subject"),
    ):
        assert [task.category(e) for e in task.examples] == ["law", "7"]
        assert [task.category(e) for e in task.take(1).split(1, 0, 0)[0].examples] == ["law"]
    by_answer = Task.from_rows(rows, category_field="answer")
    assert [by_answer.category(e) for e in by_answer.examples] == ["a", "b"]
    assert [e.fields for e in task.examples] == [{"subject": "law"}, {"subject": 7}]
    plain = Task.from_rows(rows)
    assert [plain.category(e) for e in plain.examples] == [None, None]


@pytest.mark.parametrize(
    ("row", "message"),
    (
        ({}, "no category: field 'subject' is missing or null among prompt, answer: set category_field"),
        ({"subject": None}, "no category: field 'subject' is missing or null among prompt, answer, subject"),
        ({"subject": math.nan}, "no category: field 'subject' is missing or null"),
        ({"subject": ["law"]}, "the category, field 'subject', must be a non-empty string or a number, got ['law']"),
        ({"subject": " "}, "the category, field 'subject', must be a non-empty string or a number, got ' '"),
    ),
)
def test_a_row_without_a_category_says_what_to_do(row, message):
    rows = [{"prompt": "p", "answer": "a", "subject": "law"}, {"prompt": "p", "answer": "a"} | row]
    with pytest.raises(TaskError, match=f"^task:2: {re.escape(message)}"):
        Task.from_rows(rows, category_field="subject")
    task = dataclasses.replace(Task.from_rows(rows[1:]), category_field="subject")
    with pytest.raises(TaskError, match="^task:1: .*category"):
        task.category(task.examples[0])


# Splitting


def test_a_split_follows_the_fractions_and_keeps_every_example():
    task = Task.from_rows(rows(50), name="fifty", chat=True)
    parts = task.split(0.8, 0.1, 0.1)
    assert [len(part) for part in parts] == [40, 5, 5]
    assert {e.prompt for part in parts for e in part.examples} == {e.prompt for e in task.examples}
    assert all((part.name, part.grader_name, part.chat) == ("fifty", "exact", True) for part in parts)
    assert [len(part) for part in task.split(0.5, 0, 0.1)] == [25, 0, 5]


def test_examples_with_the_same_prompt_go_to_the_same_split():
    task = Task.from_rows([{"prompt": f"prompt {i % 20}", "answer": i} for i in range(100)])
    for seed in range(10):
        parts = task.split(0.5, 0.25, 0.25, seed=seed)
        assert [len(part) for part in parts] == [50, 25, 25]
        prompts = [{e.prompt for e in part.examples} for part in parts]
        assert sum(map(len, prompts)) == len(set.union(*prompts)) == 20


def test_a_split_is_decided_by_its_seed():
    task = Task.from_rows(rows(50))
    assert task.split(seed=3) == task.split(seed=3)
    assert task.split(seed=3) != task.split(seed=4)


@pytest.mark.parametrize(
    "fractions, message",
    [
        ((0.8, 0.2, 0.1), "at most 1"),
        ((1.1, -0.1, 0), "validation must be"),
        ((float("nan"), 0, 0), "train must be"),
    ],
)
def test_fractions_that_make_no_split_are_reported(fractions, message):
    with pytest.raises(CorrSteerError, match=message):
        Task.from_rows(rows(5)).split(*fractions)


@pytest.mark.parametrize("row", ({"prompt": "a\ud800", "answer": 1}, {"prompt": "a", "answer": ["1", "\udfff"]}))
def test_half_a_character_which_no_tokenizer_takes_is_refused_where_it_is_read(row, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row), encoding="utf-8")
    for read in (lambda: Task.from_rows([row], name="a.jsonl"), lambda: Task.from_jsonl(tmp_path / "a.jsonl")):
        with pytest.raises(TaskError, match=r"^a.jsonl:1: the (prompt|answer), field .*, holds '.ud.*half of a"):
            read()


def test_take_keeps_the_first_examples():
    task = Task.from_rows(rows(5))
    assert task.take(2).examples == task.examples[:2]
    assert task.take(9) == task
    with pytest.raises(CorrSteerError, match="n must be"):
        task.take(-1)


# Prompts


class StubTokenizer:
    chat_template = "a template"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        if messages[0]["content"] == "refused":
            raise RuntimeError("System role not supported")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def test_prompts_are_raw_unless_chat_is_set():
    assert Task.from_rows(rows(2)).prompts(StubTokenizer()) == ["prompt 0", "prompt 1"]


def test_chat_prompts_go_through_the_chat_template():
    assert Task.from_rows(rows(1), chat=True).prompts(StubTokenizer()) == ["<user>prompt 0<assistant>"]
    with_system = Task.from_rows(rows(1), chat=True, system="Be brief.")
    assert with_system.prompts(StubTokenizer()) == ["<system>Be brief.<user>prompt 0<assistant>"]


def test_chat_without_a_chat_template_is_reported():
    tokenizer = StubTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(TaskError, match="chat_template"):
        Task.from_rows(rows(1), chat=True).prompts(tokenizer)


def test_a_template_that_refuses_the_messages_is_reported():
    with pytest.raises(TaskError, match="task:1: the chat template failed: .*System role not supported"):
        Task.from_rows(rows(1), chat=True, system="refused").prompts(StubTokenizer())


def test_a_system_message_without_chat_is_reported():
    with pytest.raises(TaskError, match="chat=True"):
        Task.from_rows(rows(1), system="Be brief.")


# Hugging Face datasets


def test_a_loaded_dataset_is_read_as_it_is():
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(rows(3))
    task = Task.from_dataset(dataset, name="mine")
    assert (task.name, len(task), task.examples[2]) == ("mine", 3, Example("prompt 2", "2", {}, "dataset:3"))
    assert Task.from_rows(dataset, name="mine", source="dataset") == task


def test_a_saved_dataset_is_read_from_its_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows(3)).save_to_disk(tmp_path / "sums")
    task = Task.from_dataset(tmp_path / "sums")
    assert (task.name, len(task), task.examples[0].source) == ("sums", 3, "sums:1")


def test_a_split_is_picked_from_a_dataset_with_several(tmp_path):
    datasets = pytest.importorskip("datasets")
    several = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows(n), split=name) for name, n in [("train", 3), ("test", 2)]}
    )
    several.save_to_disk(tmp_path / "sums")
    for given, name in [(several, "dataset"), (tmp_path / "sums", "sums"), (str(tmp_path / "sums"), "sums")]:
        task = Task.from_dataset(given, split="test")
        assert (len(task), task.examples[1].source) == (2, f"{name}[test]:2")
        with pytest.raises(TaskError, match=f"split of {name} must be one of train, test, got 'dev'"):
            Task.from_dataset(given, split="dev")


def test_a_folder_of_data_files_is_left_to_load_dataset(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "sums"
    folder.mkdir()
    write_lines(folder / "train.jsonl", *map(json.dumps, rows(3)))
    load = partial(datasets.load_dataset, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", load)
    task = Task.from_dataset(folder)
    assert (len(task), task.examples[2]) == (3, Example("prompt 2", "2", {}, "sums[train]:3"))
    with pytest.raises(TaskError, match="cannot load dataset sums: .*dev") as caught:
        Task.from_dataset(folder, split="dev")
    assert "\n" not in str(caught.value)


def test_something_that_is_no_dataset_is_reported():
    with pytest.raises(TaskError, match="name_or_path must be a name, a folder or a dataset, got int"):
        Task.from_dataset(3)


def test_a_missing_datasets_package_is_reported_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match="pip install datasets"):
        Task.from_dataset("cais/mmlu")


def test_importing_tasks_imports_no_heavy_package():
    code = """
import sys, corrsteer
before = set(sys.modules)
import corrsteer.tasks
print(sorted((set(sys.modules) - before) & {"torch", "transformers", "datasets", "numpy"}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
