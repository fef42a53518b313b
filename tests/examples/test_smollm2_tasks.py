"""The tasks of examples/smollm2: answers are right, parts share nothing, and a seed makes the same again."""

import re

import pytest

from corrsteer import CorrSteerError
from corrsteer.tasks import Example
from examples.smollm2 import graders, tasks, words


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_parts_share_no_prompt_and_no_group(kind):
    parts = tasks.parts(kind)
    prompts = [{example.prompt for example in part.examples} for part in parts]
    group_of = {row["prompt"]: at for at, group in enumerate(tasks.KINDS[kind].groups()) for row in group}
    groups = [{group_of[prompt] for prompt in of_part} for of_part in prompts]
    for of_part in (prompts, groups):
        assert not (of_part[0] & of_part[1] or of_part[0] & of_part[2] or of_part[1] & of_part[2])
    assert [part.part for part in parts] == ["train", "validation", "test"]
    assert all(len(part) == len(of_part) for part, of_part in zip(parts, prompts)), "no prompt is there twice"


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_a_seed_makes_the_same_and_fewer_samples_are_the_first_of_more(kind):
    more = tasks.parts(kind)
    for few, all_ in zip(tasks.parts(kind, (20, 8, 8)), more):
        assert few.examples == all_.examples[: len(few)]
    assert [part.examples for part in tasks.parts(kind, seed=1)] != [part.examples for part in more]


def test_sums_are_right():
    for example in (example for part in tasks.parts("sums") for example in part.examples):
        a, b = re.findall(r"\d+", example.prompt)
        assert int(a) + int(b) == int(example.answer)


def test_sizes_and_orders_are_right_and_as_often_yes_as_no():
    rank = {thing: at for at, line in enumerate(words.SIZES) for thing in line}
    examples = [example for part in tasks.parts("sizes") for example in part.examples]
    for example in examples:
        if example.fields["category"] == "size":
            a, b = re.fullmatch(r"Is (.+) larger than (.+)\? Answer yes or no\.", example.prompt).groups()
            right = rank[a] > rank[b]
        else:
            kind, a, b = re.fullmatch(
                r"Does the (\w+) (\w+) come before the \w+ (\w+)\? Answer yes or no\.", example.prompt
            ).groups()
            ordered = words.ORDERS[kind]
            right = ordered.index(a) < ordered.index(b)
        assert example.answer == ("yes" if right else "no")
    assert abs(sum(example.answer == "yes" for example in examples) - len(examples) / 2) < 5


def test_every_word_of_a_language_has_one_translation_in_each():
    assert all(len(line) == 1 + len(words.LANGUAGES) for line in words.TRANSLATIONS)


def test_requests_to_refuse_are_paired_with_harmless_ones():
    assert all(len(pair) == 2 and pair[0] != pair[1] for pair in words.REQUESTS)
    examples = [example for part in tasks.parts("refusal") for example in part.examples]
    assert {(example.answer, example.fields["category"]) for example in examples} == {
        ("yes", "harmful"), ("no", "harmless"),
    }  # fmt: skip


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(CorrSteerError, match="must be one of sizes, .* got 'chess'"):
        tasks.parts("chess")


@pytest.mark.parametrize(
    ("grader", "completion", "answer", "reward"),
    [
        (graders.first_word, " Yes.", "yes", 1),
        (graders.first_word, "**No**, it", "no", 1),
        (graders.first_word, "The letter", "yes", 0),
        (graders.first_word, "", "yes", 0),
        (graders.one_bare_word, "Paris\n", None, 1),
        (graders.one_bare_word, "Paris.", None, 0),
        (graders.one_bare_word, "New York", None, 0),
        (graders.one_bare_word, "", None, 0),
        (graders.one_bare_word, "AsAsAsAsAs", None, 0),
        (graders.one_bare_word, "Mississippi", None, 1),
        (graders.has_word, "The opposite is Top.", ("top", "peak"), 1),
        (graders.has_word, "The opposite is stop.", "top", 0),
        (graders.has_word, "s'il vous plaît!", "s'il vous plaît", 1),
        (graders.refuses, "I’m sorry, but I can't", "yes", 1),
        (graders.refuses, "I'm sorry, but", "no", 0),
        (graders.refuses, "To beat eggs, take", "no", 1),
        (graders.refuses, "First, you", "yes", 0),
    ],
)
def test_graders(grader, completion, answer, reward):
    assert grader(completion, Example("?", answer, {}, "here")) == reward
