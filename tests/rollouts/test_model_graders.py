"""Names of graders with models and their options."""

from pathlib import Path

import pytest
from tiny_classifiers import save_modernbert, save_roberta

from corrsteer import CorrSteerError, Task
from corrsteer.rollouts.model_graders import Judge, Refusal, Similarity, named_grader, with_models


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    return save_roberta(tmp_path_factory.mktemp("roberta"))


@pytest.fixture(scope="module")
def modernbert(tmp_path_factory):
    return save_modernbert(tmp_path_factory.mktemp("modernbert"))


def test_a_name_and_its_options_are_a_grader(roberta, modernbert, tmp_path):
    assert named_grader(f"refusal:model={roberta},threshold=0.7,batch_size=4") == Refusal(roberta, 0.7, "auto", 4)
    assert named_grader(f"similarity:model={modernbert}, threshold=none", "cpu") == Similarity(modernbert, None, "cpu")
    assert named_grader(f"refusal:model={roberta},device=cpu", "cuda") == Refusal(roberta, device="cpu")
    prompt = tmp_path / "polite.txt"
    prompt.write_text("Is {completion} polite?", encoding="utf-8")
    judge = named_grader(
        f"judge:http://localhost:8000/v1,model=org/m:7b,prompt={prompt},cache={tmp_path},otherwise=0,retries=2"
    )
    assert judge == Judge(
        "http://localhost:8000/v1", "org/m:7b", "Is {completion} polite?", "polite.txt", otherwise=0.0, retries=2,
        cache=Path(tmp_path),
    )  # fmt: skip
    assert named_grader("judge:http://localhost/v1,model=m,cache=none").cache is None
    assert judge.label.startswith("judge:http://localhost:8000/v1,model=org/m:7b,prompt=polite.txt#")


def test_only_names_of_graders_with_models_are_replaced(roberta):
    given = {"correct": "choice", "length": "length", "refusal": f"refusal:model={roberta}", "own": len}
    assert with_models(given) == given | {"refusal": Refusal(roberta)}
    assert with_models("choice") == "choice" and with_models(None) is None
    task = Task.from_rows(
        [{"prompt": "p", "answer": "B"}], with_models({"correct": "choice", "refusal": given["refusal"]})
    )
    assert task.grader_name == f"correct=choice, refusal=refusal:model={roberta},threshold=0.5"
    (rewards,) = task.grade(["B"], task.examples)
    assert list(rewards) == ["correct", "refusal"] and rewards["correct"] == 1.0


def test_a_key_in_a_name_that_is_none_is_not_repeated():
    with pytest.raises(CorrSteerError, match="key=[.]{3}") as caught:
        named_grader("judge:https://host/v1,key=sk-secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "name, message",
    [
        ("choice", "must be one of refusal, similarity, judge, got 'choice'"),
        ("refusal:modle=x", r"grader refusal has no option 'modle=x'; did you mean model\?"),
        ("refusal:0.7", "grader refusal has no option '0.7'; it has model, threshold, device, batch_size"),
        ("refusal:threshold=high", "threshold of grader refusal must be a number, got 'high'"),
        ("refusal:batch_size=none", "batch_size of grader refusal must be a number, got 'none'"),
        ("refusal:threshold=0.1,threshold=0.2", "must have each option once"),
        ("similarity:model=", "must have each option once, as model=VALUE"),
        ("judge", "must be judge:URL,model=NAME"),
        ("judge:model=m", "must be judge:URL,model=NAME"),
        ("judge:http://localhost/v1", "must be judge:URL,model=NAME"),
        ("judge:http://localhost/v1,model=m,prompt=nowhere.txt", "prompt nowhere.txt of grader judge cannot be read"),
        ("judge:localhost,model=m", "url must be that of an API"),
        ("judge:http://localhost/v1,model=m,prompt_name=x", "has no option 'prompt_name=x'"),
    ],
)
def test_a_name_that_is_none_says_what_it_must_be(name, message):
    with pytest.raises(CorrSteerError, match=message):
        named_grader(name)
