"""Graders that are classifiers, on tiny models of the right architectures."""

import logging

import pytest
import torch
from tiny_classifiers import save_modernbert, save_roberta
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from corrsteer import CorrSteerError
from corrsteer.rollouts import classifiers
from corrsteer.rollouts.classifiers import Refusal, Similarity
from corrsteer.tasks import Task, TaskError

WRITTEN = ["i can't help with that", "sure here is how", "", "the answer is paris", "how how how how to do it"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("classifiers")


@pytest.fixture(scope="module")
def roberta(folder):
    return save_roberta(folder / "roberta")


@pytest.fixture(scope="module")
def modernbert(folder):
    return save_modernbert(folder / "modernbert")


@torch.no_grad()
def logits(folder, *texts):
    """Of one text, or one pair, alone: without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    lists = [[text] for text in texts]  # of a pair whose second is empty, alone it would take the first
    return model(**AutoTokenizer.from_pretrained(folder)(*lists, return_tensors="pt")).logits[0]


def rewards(grader, completions, answers):
    rows = [{"prompt": "p"} | ({} if answer is None else {"answer": answer}) for answer in answers]
    task = Task.from_rows(rows, grader)
    return [each["reward"] for each in task.grade(completions, task.examples)]


@pytest.mark.parametrize("batch_size", (1, 2, 32))
def test_a_refusal_has_the_probability_of_the_models_label(roberta, batch_size):
    expected = [float(logits(roberta, text).softmax(-1)[1]) for text in WRITTEN]
    got = rewards(Refusal(roberta, None, batch_size=batch_size), WRITTEN, [None] * 5)
    assert got == pytest.approx(expected, abs=1e-6) and len({round(each, 4) for each in got}) > 3
    middle = sorted(expected)[2]
    given = rewards(Refusal(roberta, middle - 1e-4, batch_size=batch_size), WRITTEN, ["refuse"] * 5)
    assert given == [float(each > middle - 1e-4) for each in expected]


def test_where_the_answer_says_comply_a_refusal_is_wrong(roberta):
    refuse = rewards(Refusal(roberta, None), WRITTEN, ["refuse"] * 5)
    comply = rewards(Refusal(roberta, None), WRITTEN, ["comply"] * 5)
    assert comply == pytest.approx([1 - each for each in refuse])
    for wrong in ("refused", "safe", "B", ["comply", "answer"]):
        with pytest.raises(TaskError, match="task:1: .*takes the answers refuse and comply, got"):
            rewards(Refusal(roberta), WRITTEN[:1], [wrong])


def test_a_similarity_is_the_sigmoid_of_answer_and_completion_and_the_nearest_answer_counts(modernbert):
    answers = ["paris", ["rome", "paris"], "here", "the answer", "how to do it"]
    expected = [
        max(float(logits(modernbert, one, text).sigmoid()) for one in ([answer] if isinstance(answer, str) else answer))
        for text, answer in zip(WRITTEN, answers)
    ]
    for batch_size in (1, 3, 32):
        got = rewards(Similarity(modernbert, None, batch_size=batch_size), WRITTEN, answers)
        assert got == pytest.approx(expected, abs=1e-6) and len({round(each, 4) for each in got}) > 3
    middle = sorted(expected)[2] - 1e-4
    assert rewards(Similarity(modernbert, middle), WRITTEN, answers) == [float(each > middle) for each in expected]
    with pytest.raises(TaskError, match="task:1: no answer"):
        rewards(Similarity(modernbert), ["x"], [None])


def test_what_provenance_calls_them_is_all_that_decides(roberta, modernbert):
    assert Task.from_rows([{"prompt": "p"}], Refusal(roberta)).grader_name == f"refusal:model={roberta},threshold=0.5"
    assert Similarity(modernbert, None).label == f"similarity:model={modernbert},threshold=none"
    assert Refusal(roberta) == Refusal(roberta, device="auto")


@pytest.mark.parametrize("room", (20, None))  # None: 38, of 40 positions
def test_a_text_that_is_too_long_is_cut_and_that_is_said(tmp_path, room, caplog):
    folder = save_roberta(tmp_path, room=room)
    long = " ".join(["sure"] * 100)
    fits = " ".join(["sure"] * ((room or 38) - 2))
    with caplog.at_level(logging.WARNING):
        assert rewards(Refusal(folder, None), [long], [None]) == pytest.approx(
            rewards(Refusal(folder, None), [fits], [None])
        )
    assert [r.message for r in caplog.records] == [
        f"{folder} read the first {room or 38} tokens of 1 texts that are longer"
    ]


def test_a_model_that_does_not_fit_is_refused_when_the_grader_is_made(tmp_path, roberta, modernbert):
    other = save_roberta(tmp_path / "other", ("SAFE", "UNSAFE"))
    with pytest.raises(CorrSteerError, match="a label REJECTION, got .* with SAFE, UNSAFE; give another"):
        Refusal(other)
    with pytest.raises(CorrSteerError, match="one label, got .* with NORMAL, REJECTION"):
        Similarity(roberta)
    with pytest.raises(CorrSteerError, match="cannot be loaded on device 'auto': .*refusal_phrases"):
        Refusal(str(tmp_path / "nowhere"))
    with pytest.raises(CorrSteerError, match="cannot be loaded on device 'cuda:99'"):
        Similarity(modernbert, device="cuda:99")


def test_an_error_of_our_own_while_a_model_is_loaded_is_not_put_into_another(roberta, monkeypatch):
    def place(device):
        raise CorrSteerError("LOCAL_RANK must be a whole number")

    monkeypatch.setattr(classifiers, "_place", place)
    with pytest.raises(CorrSteerError, match="^LOCAL_RANK must be a whole number$"):
        Refusal(roberta, device="cpu:0")


@pytest.mark.parametrize("given", ({"threshold": 1.5}, {"threshold": -1}, {"threshold": "x"}, {"batch_size": 0}))
def test_an_option_that_cannot_be_is_refused_by_name(roberta, given):
    with pytest.raises(CorrSteerError, match=next(iter(given))):
        Refusal(roberta, **given)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu_they_give_what_they_give_on_a_cpu(roberta, modernbert):
    for grader, path in ((Refusal, roberta), (Similarity, modernbert)):
        answers = ["refuse"] * 5
        on_cpu = rewards(grader(path, None, device="cpu"), WRITTEN, answers)
        assert rewards(grader(path, None, device="cuda"), WRITTEN, answers) == pytest.approx(on_cpu, abs=1e-3)
