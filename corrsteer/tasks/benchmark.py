"""`Benchmark`: where a published task's rows lie, how a row becomes a prompt, and how the paper ran it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from corrsteer.arguments import whole
from corrsteer.tasks.copies import Copy
from corrsteer.tasks.examples import Example
from corrsteer.tasks.graders import TaskError, one_line
from corrsteer.tasks.grading import GraderSpec, Grading
from corrsteer.tasks.layouts import PARTS, SHOTS, WHOLE, Layout, Row
from corrsteer.tasks.questions import LETTERS, Question, listed
from corrsteer.tasks.task import Task

CATEGORY = "category"  # the key of `Example.fields` that a question's category is put in
OWN = "own"  # the grader of a benchmark itself


@dataclass(frozen=True)
class Benchmark:
    """A published task. `task` makes a `Task` of it.

    Attributes
    ----------
    name : what ``--task`` calls it.
    about : a line on what is asked.
    read : a row's `Question`, or None for a row that is not of this benchmark.
    prompt : what the model is given of a question, with ``{question}``, ``{options}`` (a line each) and ``{labels}``.
    grader : as `Task.from_rows` takes it.
    hub : the dataset on the Hugging Face hub, if there is one.
    revision : of the dataset; None takes the newest.
    layouts : of copies; the first is that of the hub.
    preamble : what every prompt begins with.
    example : a k-shot example, as `prompt` with ``{answer}`` besides; None where there cannot be any.
    options : the labels of all options, which the first token may be restricted to; None where there are none.
    pool, max_new_tokens, chat : how the paper ran it.
    fractions : into how large train, validation and test parts it is divided where its publisher has not.
    seed : of that division, and of the order of examples.
    samples : of the train part that the paper learnt from.
    """

    name: str
    about: str
    read: Callable[[Row], Question | None]
    prompt: str
    grader: GraderSpec
    hub: str | None = None
    revision: str | None = None
    layouts: tuple[Layout, ...] = ()
    preamble: str = ""
    example: str | None = None
    options: tuple[str, ...] | None = None
    pool: str = "max"
    max_new_tokens: int = 32
    chat: bool = False
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    seed: int = 42
    samples: int = 4000

    def __post_init__(self) -> None:
        for name in ("prompt", "example"):
            template = getattr(self, name) or "{question}"
            try:
                asks = "\0" in template.format(question="\0", options="", labels="", answer="")
            except (KeyError, IndexError, ValueError, AttributeError):
                asks = False
            if not asks:
                raise TaskError(
                    f"{name} must be text with {{question}}, and perhaps {{options}}, {{labels}} and {{answer}}, got "
                    f"{template!r:.80}; write other braces twice"
                )

    def task(
        self,
        part: str = "all",
        data: Any = None,
        *,
        shots: int = 0,
        grader: GraderSpec = OWN,
        chat: bool | None = None,
        system: str | None = None,
        category_field: str | None = CATEGORY,
        seed: int | None = None,
    ) -> Task:
        """A part of it as a `Task`.

        Where the publisher has a train, a validation and a test part, these are the parts; a train part without a
        validation part gives a tenth of its prompts for one; and rows that are not divided are divided by `fractions`.
        Parts that are made here share no prompt. The order of examples is drawn by the seed, so that the first n are a
        sample.

        Parameters
        ----------
        part : ``train``, ``validation``, ``test``, or ``all`` of them.
        data
            A copy of the dataset: a folder as the hub or the publishers lay it out, one with ``train.jsonl`` and the
            like, or a single file, whose rows are divided. None takes it from the hub.
        shots
            How many solved examples a prompt begins with. They come from the part that the publisher keeps for them, of
            the question's own category where it has any there, or else from the train part, which then goes without.
        grader
            Instead of the benchmark's own; None for a task without rewards. Where a benchmark's own has a model, as
            ``similarity`` and ``refusal`` have, give the model:
            ``grader=corrsteer.rollouts.model_graders.named_grader(benchmark.grader)``.
        chat : whether prompts are wrapped in the tokenizer's chat template, instead of as the paper had it.
        system : as for `Task.from_rows`.
        category_field
            ``category``, a column of the rows, or None for no results by category. A question without a category is of
            the category ``none``.
        seed : instead of the benchmark's own.

        Raises
        ------
        TaskError : for data that cannot be had or lacks a column, for more shots than there are examples, and for a
            grader with a model that is given by its name.
        """
        if part not in ("all", *PARTS):
            raise TaskError(f"part must be one of all, {', '.join(PARTS)}, got {part!r}")
        shots, seed = whole("shots", shots, 0), self.seed if seed is None else whole("seed", seed, 0)
        if shots and self.example is None:
            raise TaskError(f"shots must be 0, as {self.name} has no examples to show, got {shots}")
        rows = _Rows(self, Copy(self.name, self.layouts, self.hub, self.revision, data))
        chosen, shown = self._divided(rows, part, shots, seed)
        if not chosen:
            raise TaskError(f"the {part} part of {self.name} is empty; take another part, or more data")
        asked = rows.questions(chosen)
        prompts = [self.ask(question, shown.of(question, shots)) for question in asked]
        examples = tuple(replace(example, prompt=prompt) for example, prompt in zip(chosen, prompts))
        task = Task(
            self.name, examples, Grading.of(None), self.chat if chat is None else chat, system, part, category_field,
            self.options, rows.copy.dataset,
        ).graded_by(self.grader if grader == OWN else grader)  # fmt: skip
        for example in task.examples if category_field is not None else ():
            task.category(example)  # which says where there is none
        return task

    def _divided(self, rows: _Rows, part: str, shots: int, seed: int) -> tuple[list[Example], _Shots]:
        """The examples of a part, with prompts of no shots, and what is shown before them."""
        names = PARTS if part == "all" else (part,)
        own_shots = shots > 0 and rows.copy.has(SHOTS)
        needed = set(names) | ({"train"} if shots and not own_shots else set())
        parts = _parts(rows, needed, self.fractions, seed)
        if own_shots:
            shown = _Shots(self.name, rows.questions(rows.examples(SHOTS)))
        else:
            train = parts.get("train", ())
            shown = _Shots(self.name, rows.questions(train[:shots]), by_category=False)
            parts["train"] = train[shots:]
        return [example for name in names for example in parts[name]], shown

    def ask(self, question: Question, shown: Sequence[Question] = ()) -> str:
        """The prompt of a question, after solved ones that are shown."""
        examples = "".join(self._written(self.example or "", one) for one in shown)
        return self.preamble + examples + self._written(self.prompt, question)

    def _written(self, template: str, question: Question) -> str:
        labels = LETTERS[: len(question.options)]
        lines = "\n".join(f"{label}. {option}" for label, option in zip(labels, question.options))
        return template.format(
            question=question.text, options=lines, labels=listed(labels), answer=question.answer,
        )  # fmt: skip


class _Rows:
    """A benchmark's rows as examples, and the questions that they were read as."""

    def __init__(self, benchmark: Benchmark, copy: Copy):
        self._benchmark, self.copy = benchmark, copy
        self._questions: dict[str, Question] = {}  # by where each stood

    def questions(self, examples: Iterable[Example]) -> list[Question]:
        """What examples ask."""
        return [self._questions[example.source] for example in examples]

    def examples(self, part: str) -> list[Example]:
        """The examples of a part, with prompts of no shots, in their order."""
        found = []
        for where, row in self.copy.rows(part):
            try:
                question = self._benchmark.read(row)
            except Exception as error:  # a function of the user's may raise anything
                raise TaskError(f"{where}: {one_line(error)}") from error
            if question is not None:
                self._questions[where] = question
                fields = row | {CATEGORY: question.category or "none"}
                found.append(Example(self._benchmark.ask(question), question.answer, fields, where))
        return found

    def split(self, part: str, fractions: tuple[float, float, float], seed: int) -> dict[str, tuple[Example, ...]]:
        """The examples of a part, divided."""
        task = Task(self._benchmark.name, tuple(self.examples(part)), Grading.of(None))
        return {name: of_part.examples for name, of_part in zip(PARTS, task.split(*fractions, seed=seed))}


class _Shots:
    """Solved questions to show, by category if they are kept for it."""

    def __init__(self, name: str, questions: Sequence[Question], by_category: bool = True):
        self._name, self._all = name, questions
        self._of: dict[str | None, list[Question]] = {}
        for question in questions if by_category else ():
            self._of.setdefault(question.category, []).append(question)

    def of(self, question: Question, n: int) -> Sequence[Question]:
        """The first n for a question: of its category where that has any, of all where not."""
        found = self._of.get(question.category, self._all)
        if len(found) < n:
            of = f" of category {question.category!r}" if question.category in self._of else ""
            raise TaskError(f"shots must be at most {len(found)}, as {self._name} has no more examples{of}, got {n}")
        return found[:n]


def _parts(
    rows: _Rows, names: Iterable[str], fractions: tuple[float, float, float], seed: int
) -> dict[str, tuple[Example, ...]]:
    """The examples of each part, as the publisher has divided them or as we do."""
    if rows.copy.has(WHOLE):
        return rows.split(WHOLE, fractions, seed)
    parts: dict[str, tuple[Example, ...]] = {}
    if not rows.copy.has("validation") and {"train", "validation"} & set(names):
        parts = rows.split("train", (0.9, 0.1, 0.0), seed)
        del parts["test"]
    for name in sorted(set(names) - set(parts)):
        examples = rows.examples(name)
        random.Random(seed).shuffle(examples)
        parts[name] = tuple(examples)
    return parts
