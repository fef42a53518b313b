"""Numbers and labels in awkward answers, against what a reader says and what published code reads."""

import re
from fractions import Fraction

import pytest
from awkward_answers import LABELS, NUMBERS

from corrsteer.tasks import Task, TaskError
from corrsteer.tasks.extraction import DIGITS, LETTER, Number, final_label, final_number

NUMBER_ROWS = [(why, *row) for why, rows in NUMBERS.items() for row in rows]
LABEL_ROWS = [(why, *row) for why, rows in LABELS.items() for row in rows]


def number(text):
    return None if text is None else Number(Fraction(text.rstrip("%")), text.endswith("%"))


# Published: GSM8K's `extract_answer`, the flexible filter of lm-evaluation-harness 0.4.13 with what its exact_match
# ignores, and MMLU-Pro's `extract_answer`, `extract_again`, `extract_final`.


def gsm8k(text):
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found and found[1].replace(",", "")


def flexible(text):
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    read = next((part for part in found[-1] if part), None) if found else None
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        read = read and re.sub(ignored, "", read)
    return read


def mmlu_pro(text):
    text = text.replace("**", "")
    found = re.search(r"answer is \(?([A-J])\)?", text) or re.search(r".*[aA]nswer:\s*([A-J])", text)
    found = found or re.search(r"\b([A-J])\b(?!.*\b[A-J]\b)", text, re.DOTALL)
    return found and found[1]


def value(read):
    """A published reading as a number, None where it is none."""
    try:
        return Number(Fraction(read))
    except (TypeError, ValueError):
        return None


def test_there_are_at_least_150_awkward_answers_and_none_twice():
    for rows in (NUMBER_ROWS, LABEL_ROWS):
        assert len({row[1] for row in rows}) == len(rows)
    assert len(NUMBER_ROWS) + len(LABEL_ROWS) >= 150


@pytest.mark.parametrize("why, text, truth, theirs, looser", NUMBER_ROWS)
def test_a_number_is_read_as_a_reader_would(why, text, truth, theirs, looser):
    assert final_number(text) == number(truth), why
    assert (gsm8k(text), flexible(text)) == (theirs, looser)


@pytest.mark.parametrize("why, text, truth, theirs", LABEL_ROWS)
def test_a_label_is_read_as_a_reader_would(why, text, truth, theirs):
    assert final_label(text, LETTER) == truth, why
    assert mmlu_pro(text) == theirs


@pytest.mark.parametrize("theirs", (gsm8k, flexible))
def test_where_published_code_reads_another_number_a_group_says_why(theirs):
    ours_alone = {
        why
        for why, text, truth, *_ in NUMBER_ROWS
        if (read := value(theirs(text))) is not None and not read.matches(number(truth))
    }
    agreed = {"A number alone is the answer", "Without digits there is no number"}
    assert not ours_alone & agreed and ours_alone


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("50%", "50", 1),
        ("50%", "0.5", 1),
        ("50", "50%", 1),
        ("0.5", "50%", 1),
        ("50%", "50%", 1),
        ("0.5%", "50%", 0),
        ("5", "50%", 0),
        ("3/4", "0.75", 1),
        ("3/4", "4", 0),
        ("0.33", "1/3", 0),
        ("1" * 5000, "1", 0),
        ("1" * 5000, "1" * 5000, 1),
        ("#### 41\n#### 42", "42", 1),
        ("12.0", "12", 1),
        ("42", "6 * 7 is 42.\n#### 42", 1),
    ],
)
def test_numbers_match_by_value_and_a_percent_sign_may_be_a_unit(completion, answer, reward):
    task = Task.from_rows([{"prompt": "p", "answer": answer}], "number")
    assert task.reward(completion, task.examples[0]) == reward


def test_of_digits_as_labels_none_is_read_that_merely_stands_there():
    assert final_label("answer: 2", DIGITS) == "2" and final_label("It has 2 legs and 4 arms", DIGITS) is None
    assert final_label("\\boxed{2}", DIGITS) == "2"


def test_long_texts_are_read_quickly():
    for text in ("answer is " * 3000, "1/2 " * 3000, "(" * 30_000, "- " * 10_000, "\n" * 30_000 + "x", "1," * 10_000):
        final_number(text)
        final_label(text, LETTER)


def test_an_answer_without_a_number_is_refused_when_it_is_read():
    with pytest.raises(TaskError, match="needs a number in the answer, got 'forty'"):
        Task.from_rows([{"prompt": "p", "answer": "forty"}], "number")
