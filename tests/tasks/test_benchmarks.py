"""Benchmarks from files in every layout that they come in: prompts as text, answers, categories and parts."""

import json
from collections import Counter
from dataclasses import replace

import benchmark_files as files
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from corrsteer import Benchmark, CorrSteerError, Task, benchmarks, load_benchmark
from corrsteer.tasks import Layout, Question, TaskError
from corrsteer.tasks.questions import label as read_label
from corrsteer.tasks.questions import text

COPIES = [
    pytest.param(name, write, id=f"{name}-{write.__name__}")
    for name, copies in files.COPIES.items()
    for write in copies
]
PARTS = ("train", "validation", "test")


def task(name, folder, part="all", **options):
    """A part of a benchmark, with a grader that needs no model."""
    return load_benchmark(name).task(part, folder, grader="exact", **options)


def test_every_benchmark_is_tested_in_its_layouts():
    assert list(files.COPIES) == list(benchmarks()) == [benchmark.name for benchmark in benchmarks().values()]
    for name, benchmark in benchmarks().items():
        assert benchmark.hub and len(files.COPIES[name]) >= len(benchmark.layouts)


# What a model is asked: of the test part's first row in the files, without and with examples

PROMPTS = {
    "mmlu": (
        "How often, test 0, is geology asked for?\nA. never, 0\nB. once, 0\nC. as \"often\" as not, 0\nD. always, 0\n"
        "Choose one of the following options only: A, B, C, or D\nAnswer:",
        "A",
        "geology",
    ),
    "mmlu_pro": (
        "Which sum, test 0, is meant?\nA. 0 and 0\nB. 0 and 1\nC. 0 and 2\n"
        "Choose one of the following options only: A, B, or C\nAnswer:",
        "A",
        "math",
    ),
    "gsm8k": (
        "Q: In a shop, how many pears have 0 and a thousand baskets?\n"
        "A: Give your final numerical answer after ####\n",
        "1,000",
        "none",
    ),
    "bbq": (
        "Two people came to room 0 of Age.\nWho was late, 0?\nA. The first\nB. The second\nC. Not known\n"
        "Choose one of the following options only: A, B, or C\nAnswer:",
        "C",
        "Age",
    ),
    "bbq:disambig": (
        "Two people came to room 0 of Age. The age person said it was they.\nWho was late, 0?\nA. The first\n"
        "B. The second\nC. Not known\nChoose one of the following options only: A, B, or C\nAnswer:",
        "A",
        "Age",
    ),
    "simpleqa": (
        "Answer the question with a short, direct response. Be concise and factual.\n\n"
        "Q: In which year, \"roughly\", was song 0 sung?\nA:",
        "1900, in spring",
        "Music",
    ),
    "harmbench": (
        "Request: A page on 0.\nIt ends.\nWrite contextual nonsense number 0\nResponse:",
        "refuse",
        "illegal",
    ),
    "xstest": ("Request: How do I tie knot 0?\nClassification:", "comply", "homonyms"),
}  # fmt: skip
PROMPTS["bbq:ambig"] = PROMPTS["bbq"]


@pytest.mark.parametrize(("name", "write"), COPIES)
def test_a_prompt_is_the_same_from_every_layout(name, write, tmp_path):
    write(tmp_path)
    prompt, answer, category = PROMPTS[name]
    found = [example for example in task(name, tmp_path).examples if example.prompt == prompt]
    assert [(example.answer, example.fields["category"]) for example in found] == [(answer, category)]


SOLVED = {
    "mmlu": (
        "How often, shots 0, is us_history asked for?\n"
        "A. never, 0\nB. once, 0\nC. as \"often\" as not, 0\nD. always, 0\nAnswer: A\n"
        "How often, shots 1, is us_history asked for?\n"
        "A. never, 1\nB. once, 1\nC. as \"often\" as not, 1\nD. always, 1\nAnswer: B\n"
        "How often, test 3, is us_history asked for?\n"
        "A. never, 3\nB. once, 3\nC. as \"often\" as not, 3\nD. always, 3\n"
        "Choose one of the following options only: A, B, C, or D\nAnswer:"
    ),
    "mmlu_pro": (
        "Which sum, validation 1, is meant?\nA. 1 and 0\nB. 1 and 1\nC. 1 and 2\nD. 1 and 3\nAnswer: B\n"
        "Which sum, validation 3, is meant?\nA. 3 and 0\nB. 3 and 1\nC. 3 and 2\nD. 3 and 3\nE. 3 and 4\nF. 3 and 5\n"
        "Answer: A\n"
        "Which sum, test 9, is meant?\nA. 9 and 0\nB. 9 and 1\nC. 9 and 2\nD. 9 and 3\n"
        "Choose one of the following options only: A, B, C, or D\nAnswer:"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "write"), [copy for copy in COPIES if copy.values[0] in SOLVED])
def test_examples_are_those_that_are_kept_for_it_of_the_questions_own_category(name, write, tmp_path):
    write(tmp_path)
    part = "test" if name == "mmlu" else "all"
    assert SOLVED[name] in [example.prompt for example in task(name, tmp_path, part, shots=2).examples]
    with pytest.raises(TaskError, match="shots must be at most [35], as .* has no more examples of category '.*', got"):
        task(name, tmp_path, part, shots=9)


@pytest.mark.parametrize("write", files.COPIES["mmlu"])
def test_mmlus_training_rows_have_no_subject_and_are_shown_examples_of_any(write, tmp_path):
    write(tmp_path)
    train = task("mmlu", tmp_path, "train", shots=1)
    assert len(train) == 12 and {example.fields["category"] for example in train.examples} == {"none"}
    assert all(example.prompt.startswith("How often, shots 0, is geology") for example in train.examples)


def test_a_training_file_of_mmlu_that_is_called_like_a_subjects_test_has_no_subject(tmp_path):
    files.mmlu_csv(tmp_path)
    (tmp_path / "auxiliary_train/race.csv").rename(tmp_path / "auxiliary_train/mc_test.csv")
    for data, part in ((tmp_path, "train"), (tmp_path / "auxiliary_train/mc_test.csv", "all")):
        assert {example.fields["category"] for example in task("mmlu", data, part).examples} == {"none"}


@pytest.mark.parametrize("name", ["gsm8k", "simpleqa", "bbq:ambig"])
def test_without_a_part_that_is_kept_for_it_examples_come_from_train_which_goes_without_them(name, tmp_path):
    files.COPIES[name][0](tmp_path)
    plain, shown = task(name, tmp_path, "train"), task(name, tmp_path, "train", shots=2)
    assert len(shown) == len(plain) - 2
    for part in PARTS:
        first = {example.source: example for example in task(name, tmp_path, part).examples}
        for example in task(name, tmp_path, part, shots=2).examples:
            own = first[example.source].prompt
            tail = own.removeprefix(load_benchmark(name).preamble)
            assert example.prompt.endswith(tail) and len(example.prompt) > len(own)
            solved = example.prompt[: -len(tail)]
            assert tail not in solved
            assert all(one.answer in solved for one in plain.examples[:2]), "with their answers, the same for all"
    with pytest.raises(TaskError, match=f"shots must be at most {len(plain)}, as {name} has no more examples, got 99"):
        task(name, tmp_path, "test", shots=99)


@pytest.mark.parametrize("name", ["harmbench", "xstest"])
def test_requests_have_no_examples_to_show(name, tmp_path):
    files.COPIES[name][0](tmp_path)
    with pytest.raises(TaskError, match=f"shots must be 0, as {name} has no examples to show, got 1"):
        task(name, tmp_path, shots=1)


# Parts


@pytest.mark.parametrize(("name", "write"), COPIES)
def test_parts_share_no_prompt_make_up_all_and_are_the_same_from_every_layout(name, write, tmp_path):
    write(tmp_path)
    files.COPIES[name][0](tmp_path / "hub")
    prompts = {}
    for part in PARTS:
        prompts[part] = [example.prompt for example in task(name, tmp_path, part).examples]
        assert Counter(prompts[part]) == Counter(e.prompt for e in task(name, tmp_path, part).examples)
        assert len(prompts[part]) > 0 and task(name, tmp_path, part).part == part
    together = [example.prompt for example in task(name, tmp_path).examples]
    assert together == [prompt for part in PARTS for prompt in prompts[part]]
    assert not set(prompts["train"]) & set(prompts["test"]) and not set(prompts["validation"]) & set(prompts["test"])


def test_parts_are_the_publishers_where_there_are_some(tmp_path):
    files.mmlu_csv(tmp_path)
    assert [len(task("mmlu", tmp_path, part)) for part in PARTS] == [12, 10, 16]
    files.gsm8k_jsonl(tmp_path / "gsm8k")
    assert [len(task("gsm8k", tmp_path / "gsm8k", part)) for part in PARTS] == [18, 2, 6], "a tenth of train"


def test_what_is_not_divided_is_divided_as_in_the_papers_code(tmp_path):
    files.simpleqa_csv(tmp_path)
    assert [len(task("simpleqa", tmp_path, part)) for part in PARTS] == [8, 1, 21]


def test_the_order_is_drawn_by_the_seed_and_the_benchmarks_own_is_the_papers(tmp_path):
    files.mmlu_hub(tmp_path)
    prompts = lambda **seed: [e.prompt for e in task("mmlu", tmp_path, "train", **seed).examples]  # noqa: E731
    assert prompts() == prompts(seed=42) != prompts(seed=1) and sorted(prompts()) == sorted(prompts(seed=1))
    assert [int(p.split()[3].strip(",")) for p in prompts()] != list(range(12))


@pytest.mark.parametrize("name", ["bbq:ambig", "bbq:disambig"])
def test_the_kinds_of_contexts_are_half_of_the_rows_each(name, tmp_path):
    files.bbq_jsonl(tmp_path)
    assert len(task(name, tmp_path)) == 20 == len(task("bbq", tmp_path)) // 2
    assert {e.fields["context_condition"] for e in task(name, tmp_path).examples} == {name.partition(":")[2]}


@pytest.mark.parametrize("part", ["test", "dev", None])
def test_the_part_must_be_one_that_there_is(part, tmp_path):
    files.simpleqa_csv(tmp_path)
    if part == "test":
        assert task("simpleqa", tmp_path, part)
    else:
        with pytest.raises(TaskError, match=f"part must be one of all, train, validation, test, got {part!r}"):
            task("simpleqa", tmp_path, part)


# Copies


def test_one_file_is_divided_whatever_it_is_called(tmp_path):
    files.mmlu_csv(tmp_path)
    one = tmp_path / "test/geology_test.csv"
    assert [len(task("mmlu", one, part)) for part in PARTS] == [6, 1, 1]
    assert {example.fields["category"] for example in task("mmlu", one).examples} == {"geology"}
    files.gsm8k_jsonl(tmp_path)
    assert [len(task("gsm8k", tmp_path / "train.jsonl", part)) for part in PARTS] == [16, 2, 2]


def test_a_csv_file_with_a_header_of_another_name_is_read_by_its_header(tmp_path):
    rows = [{"question": f"What is {n}?", "A": "a", "B": "b", "C": "c", "D": "d", "answer": "B"} for n in range(9)]
    files.table(tmp_path / "mine.csv", rows)
    assert task("mmlu", tmp_path / "mine.csv").examples[0].answer == "B"


def test_a_copy_of_ones_own_has_a_file_or_a_folder_a_part(tmp_path):
    files.jsonl(tmp_path / "train.jsonl", list(files.gsm8k_rows("field", 20)))
    files.parquet(tmp_path / "validation/first.parquet", list(files.gsm8k_rows("school", 3)))
    (tmp_path / "test.json").write_text(json.dumps(list(files.gsm8k_rows("shop", 4))))
    assert [len(task("gsm8k", tmp_path, part)) for part in ("validation", "test")] == [3, 4]
    assert task("gsm8k", tmp_path, "validation").examples[0].source.startswith("validation/first.parquet:")


def test_sources_say_where_a_row_stood_and_are_all_different(tmp_path):
    files.mmlu_csv(tmp_path)
    sources = [example.source for example in task("mmlu", tmp_path).examples]
    assert "test/geology_test.csv:8" in sources and len(set(sources)) == len(sources)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("gsm8k", "train.jsonl", '{"question": "?"}\n', r"train.jsonl:1: no column 'answer' among question"),
        ("gsm8k", "train.jsonl", '{"question": "?", "answer": "5"}\n', r"train.jsonl:1: column 'answer' must end with"),
        ("gsm8k", "train.jsonl", '{"question": 7, "answer": "#### 5"}\n', r"column 'question' must be text, got 7"),
        ("gsm8k", "train.jsonl", "[1]\n", r"^train.jsonl:1: a row must have named columns, got list"),
        ("gsm8k", "train.jsonl", "\n\n{\n", r"train.jsonl cannot be read as jsonl: .*line 3, column 2: Expecting"),
        ("gsm8k", "train.parquet", "no parquet", r"train.parquet cannot be read as parquet: "),
        ("mmlu", "test/a_test.csv", "What?,a,b,c,d\n", r"test/a_test.csv cannot be read as csv: .* of 5 cells, not 6"),
        ("mmlu", "test/a_test.csv", "What?,a,b,c,d,E\n", r"csv:1: the answer must be one of A, B, C, or D, or"),
        ("mmlu", "test.jsonl", '{"question": "?", "choices": "ab", "answer": 0}', r"'choices' must be a list of text"),
        ("bbq:ambig", "data/A.jsonl", '{"context_condition": "both"}', r"must be 'ambig' or 'disambig', got 'both'"),
        ("simpleqa", "a.csv", "metadata,problem,answer\nx y,p,a\n", r"'metadata' must be a dictionary with a 'topic'"),
        ("xstest", "a.jsonl", '{"prompt": "p", "type": "t", "label": "?"}', r"'label' must be 'safe' or 'unsafe'"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_it_should_be_is_refused_with_the_row(name, file, content, message, tmp_path):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(TaskError, match=message):
        task(name, tmp_path, "test" if "test" in file else "train")


def test_a_folder_without_the_files_is_refused_with_what_there_is(tmp_path):
    with pytest.raises(TaskError, match="data must be a file or a folder that is there, got '.*nowhere'"):
        task("mmlu", tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(TaskError, match=r"has none of the files all/auxiliary_train-\*.parquet.*; it has notes.txt"):
        task("mmlu", tmp_path)
    files.mmlu_csv(tmp_path)
    for path in (tmp_path / "test").iterdir():
        path.unlink()
    with pytest.raises(TaskError, match=r"the test part of mmlu is missing: .* has no test/\*_test.csv"):
        task("mmlu", tmp_path, "test")
    with pytest.raises(TaskError, match=r"notes.txt must end with .parquet, .jsonl, .json, .csv, got '.txt'"):
        task("mmlu", tmp_path / "notes.txt")
    with pytest.raises(CorrSteerError, match="data must be a path, got 7"):
        task("mmlu", 7)


# The hub


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A hub that cannot be reached, and an empty cache of it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("name", files.COPIES)
def test_a_benchmark_comes_from_the_hubs_cache_with_the_same_examples_as_from_a_copy(name, offline):
    write = files.COPIES[name][0]
    files.hub_cache(offline, load_benchmark(name).hub, write)
    write(offline / "copy")
    for part in PARTS:
        cached, copied = task(name, None, part), task(name, offline / "copy", part)
        assert replace(copied, grading=cached.grading) == cached


def test_a_record_of_samples_from_the_hub_has_the_datasets_commit(offline):
    files.hub_cache(offline, "cais/mmlu", files.mmlu_hub)
    assert task("mmlu", None, "test").take(2).samples()["dataset"] == f"cais/mmlu@{files.COMMIT}"
    files.mmlu_hub(offline / "copy")
    assert "dataset" not in task("mmlu", offline / "copy", "test").samples()


@pytest.mark.parametrize("name", ["simpleqa", "harmbench", "xstest"])
def test_in_python_a_grader_with_a_model_is_given_as_the_model(name, tmp_path):
    files.COPIES[name][0](tmp_path)
    with pytest.raises(TaskError, match=r"give Task the grader and not its name: .*named_grader\("):
        load_benchmark(name).task("test", tmp_path)


def test_a_script_of_a_dataset_is_never_run(offline):
    def write(folder):
        files.bbq_jsonl(folder)
        (folder / "bbq.py").write_text("raise SystemExit('it was run')")

    files.hub_cache(offline, "heegyu/bbq", write)
    assert len(task("bbq", None)) == 40


def test_of_the_hub_only_the_files_of_the_part_are_asked_for(monkeypatch, tmp_path):
    asked = []

    def snapshot(repository, *, repo_type, revision, allow_patterns):
        asked.append((repository, repo_type, revision, allow_patterns))
        files.mmlu_hub(tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    task("mmlu", None, "test")
    assert asked == [("cais/mmlu", "dataset", None, ["all/test-*.parquet"])]


def test_what_the_hub_does_not_give_is_to_be_given_as_a_copy(offline):
    with pytest.raises(TaskError, match="dataset walledai/XSTest cannot be had from the hub: .*: --data PATH, or"):
        task("xstest", None)


def test_of_a_gated_dataset_it_is_said_that_its_terms_have_to_be_accepted(monkeypatch):
    import httpx

    def refuse(*_, **__):
        response = httpx.Response(403, request=httpx.Request("GET", "https://hub"))
        raise errors.GatedRepoError("gated", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(TaskError, match="accept its terms on its page and run `hf auth login`, or give a copy"):
        task("harmbench", None)


# What a task has of its benchmark


def test_a_task_has_the_benchmarks_grader_options_chat_and_categories(tmp_path):
    files.mmlu_hub(tmp_path)
    mmlu = load_benchmark("mmlu").task("test", tmp_path)
    assert (mmlu.name, mmlu.grader_name, mmlu.options, mmlu.chat) == ("mmlu", "choice", ("A", "B", "C", "D"), False)
    assert {mmlu.category(example) for example in mmlu.examples} == set(files.SUBJECTS)
    right = [f" {example.answer}" for example in mmlu.examples]
    assert mmlu.rewards(right, mmlu.examples) == [1.0] * 16
    other = load_benchmark("mmlu").task("test", tmp_path, grader="exact", chat=True, system="Be short.")
    assert (other.grader_name, other.chat, other.system) == ("exact", True, "Be short.")


def test_a_number_is_graded_with_its_thousands_separator(tmp_path):
    files.gsm8k_jsonl(tmp_path)
    gsm8k = load_benchmark("gsm8k").task("test", tmp_path)
    assert gsm8k.options is None
    right = [f"It is {int(example.answer.replace(',', ''))}." for example in gsm8k.examples]
    assert gsm8k.rewards(right, gsm8k.examples) == [1.0] * 6


def test_another_column_can_be_the_category(tmp_path):
    files.bbq_jsonl(tmp_path)
    bbq = task("bbq", tmp_path, category_field="question_polarity")
    assert {bbq.category(example) for example in bbq.examples} == {"neg", "nonneg"}
    assert task("bbq", tmp_path, category_field=None).category_field is None
    with pytest.raises(TaskError, match="data/Age.jsonl:.*no category: field 'polarity' is missing"):
        task("bbq", tmp_path, category_field="polarity")


# The registry


def read_capital(row):
    return Question(text(row, "country"), row["capital"])


CAPITALS = Benchmark("capitals", "capitals of countries", read_capital, "The capital of {question} is", "exact")


def test_a_benchmark_of_ones_own_needs_little(tmp_path):
    rows = [{"country": f"Country {n}", "capital": f"City {n}"} for n in range(20)]
    files.jsonl(tmp_path / "capitals.jsonl", rows)
    own = CAPITALS.task("train", tmp_path)
    assert isinstance(own, Task) and len(own) == 16 and own.examples[0].prompt.startswith("The capital of Country ")
    with pytest.raises(TaskError, match="data must be given, as capitals is not on the hub: --data PATH"):
        CAPITALS.task()


def test_what_a_function_of_ones_own_raises_names_the_row(tmp_path):
    files.jsonl(tmp_path / "capitals.jsonl", [{"country": "A", "capital": "B"}, {"country": "C"}])
    with pytest.raises(TaskError, match="capitals.jsonl:2: KeyError: 'capital'"):
        CAPITALS.task("all", tmp_path)


@pytest.mark.parametrize("prompt", ["{query}", "{}", "{question", "What?", "{question.text}"])
def test_a_prompt_has_the_question_and_nothing_that_is_not_known(prompt):
    with pytest.raises(TaskError, match="prompt must be text with {question}, and perhaps"):
        replace(CAPITALS, prompt=prompt)
    with pytest.raises(TaskError, match="example must be text with {question}, and perhaps"):
        replace(CAPITALS, example=prompt)


def test_braces_in_a_question_stay(tmp_path):
    files.jsonl(tmp_path / "data[1].jsonl", [{"country": "{answer} {0} {", "capital": "B"}] * 3)
    own = replace(CAPITALS, prompt="{{x}} {question}").task("all", tmp_path / "data[1].jsonl")
    assert {example.prompt for example in own.examples} == {"{x} {answer} {0} {"}


def test_a_benchmark_in_a_file_is_found_by_its_name_there(tmp_path):
    file = tmp_path / "capitals.py"
    file.write_text("from test_benchmarks import CAPITALS\nOTHER = 3\n")
    assert load_benchmark(f"{file}:CAPITALS").name == "capitals"
    with pytest.raises(TaskError, match="capitals.py:OTHER must name a Benchmark, got int; the file has CAPITALS"):
        load_benchmark(f"{file}:OTHER")
    with pytest.raises(TaskError, match="is in a file that is not there"):
        load_benchmark(f"{tmp_path}/none.py:CAPITALS")
    file.write_text("1 / 0\n")
    with pytest.raises(TaskError, match="cannot be run: ZeroDivisionError: division by zero"):
        load_benchmark(f"{file}:CAPITALS")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("mmul", "mmlu"), ("MMLU", "mmlu"), ("mmlu-pro", "mmlu_pro"), ("mmlupro", "mmlu_pro"),
     ("bbq:ambiguous", "bbq:ambig"), ("gsm-8k", "gsm8k"), ("simple_qa", "simpleqa"), ("xs-test", "xstest")],
)  # fmt: skip
def test_a_name_that_is_nearly_one_is_answered_with_what_was_meant(name, meant):
    with pytest.raises(TaskError, match=f"task '{name}' is no benchmark; did you mean {meant}"):
        load_benchmark(name)


def test_a_name_that_is_none_is_answered_with_all():
    with pytest.raises(TaskError, match="task 'poetry' is no benchmark; there are mmlu, mmlu_pro, gsm8k, bbq, "):
        load_benchmark("poetry")


@pytest.mark.parametrize(
    ("answer", "label"),
    [(0, "A"), ("2", "C"), ("B", "B"), (" C ", "C"), (3, None), ("D", None), (True, None), (None, None)],
)
def test_an_answer_is_a_label_or_an_index(answer, label):
    if label is not None:
        assert read_label(answer, ["a", "b", "c"]) == label
    else:
        with pytest.raises(TaskError, match="the answer must be one of A, B, or C, or its index, got "):
            read_label(answer, ["a", "b", "c"])


def test_a_layout_takes_the_files_of_every_pattern_once(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text("")
    layout = Layout({"whole": ["*.jsonl", "a.*"]})
    assert [path.name for path in layout.files(tmp_path, "whole")] == ["a.jsonl", "b.jsonl"]
