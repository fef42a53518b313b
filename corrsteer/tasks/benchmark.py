"""`Benchmark`: where a published task's rows lie, how a row becomes a prompt, and how the paper ran it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from corrsteer.arguments import as_path, whole
from corrsteer.tasks import layouts
from corrsteer.tasks.examples import Example
from corrsteer.tasks.graders import TaskError
from corrsteer.tasks.grading import GraderSpec, Grading
from corrsteer.tasks.hub import fetch
from corrsteer.tasks.layouts import PARTS, SHOTS, WHOLE, Layout, Row
from corrsteer.tasks.task import Task

CATEGORY = "category"  # the key of `Example.fields` that a question's category is put in
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """What a row asks.

    Attributes
    ----------
    text : the question, with what has to be read before it.
    answer : as the grader takes it; for a choice the label.
    category : None where the row does not say.
    options : to choose from, in the order of their labels A, B, ...
    """

    text: str
    answer: str | None = None
    category: str | None = None
    options: tuple[str, ...] = ()


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

    def task(
        self,
        part: str = "all",
        data: Any = None,
        *,
        shots: int = 0,
        grader: GraderSpec = "default",
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
        grader, chat : instead of the benchmark's own.
        system : as for `Task.from_rows`.
        category_field
            ``category``, a column of the rows, or None for no results by category. A question without a category is of
            the category ``none``.
        seed : instead of the benchmark's own.

        Raises
        ------
        TaskError : for data that cannot be had or lacks a column, and for more shots than there are examples.
        """
        if part not in ("all", *PARTS):
            raise TaskError(f"part must be one of all, {', '.join(PARTS)}, got {part!r}")
        shots, seed = whole("shots", shots, 0), self.seed if seed is None else whole("seed", seed, 0)
        if shots and self.example is None:
            raise TaskError(f"shots must be 0, as {self.name} has no examples to show, got {shots}")
        copy = _Copy(self, data)
        chosen, shown = self._divided(copy, part, shots, seed)
        if len(chosen) == 0:
            raise TaskError(f"the {part} part of {self.name} is empty; take another part, or more data")
        asked = [copy.questions[example.source] for example in chosen.examples]
        prompts = [self.ask(question, shown.of(question, shots)) for question in asked]
        examples = tuple(replace(example, prompt=text) for example, text in zip(chosen.examples, prompts))
        task = Task(
            self.name, examples, Grading.of(None), self.chat if chat is None else chat, system, part, category_field,
            self.options,
        ).graded_by(self.grader if grader == "default" else grader)  # fmt: skip
        for example in task.examples if category_field is not None else ():
            task.category(example)  # which says where there is none
        return task

    def _divided(self, copy: _Copy, part: str, shots: int, seed: int) -> tuple[Task, _Shots]:
        """The examples of a part, with prompts of no shots, and what to take examples from."""
        names = PARTS if part == "all" else (part,)
        own_shots = shots > 0 and copy.has(SHOTS)
        needed = set(names) | ({"train"} if shots and not own_shots else set())
        parts = _parts(copy, needed, self.fractions, seed)
        if own_shots:
            shown = _Shots(self.name, copy.asked(SHOTS))
        else:
            train = parts.get("train", ())
            shown = _Shots(self.name, [copy.questions[example.source] for example in train[:shots]], by_category=False)
            parts["train"] = train[shots:]
        return copy.task([example for name in names for example in parts.get(name, ())]), shown

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


class _Copy:
    """A benchmark's files, and the questions that were read of them by where each stood."""

    def __init__(self, benchmark: Benchmark, data: Any):
        self._benchmark = benchmark
        self._data = None if data is None else as_path("data", data)
        self.questions: dict[str, Question] = {}
        if self._data is None:
            if benchmark.hub is None or not benchmark.layouts:
                raise TaskError(f"data must be given, as {benchmark.name} is not on the hub: --data PATH")
            self._layout = benchmark.layouts[0]
        elif self._data.is_file():  # which is whole, whatever its name
            self._layout = replace(_layout_of(self._data, benchmark.layouts), parts={WHOLE: [self._data.name]})
            self._data = self._data.parent
        else:
            self._layout = layouts.find(self._data, benchmark.layouts)

    def has(self, part: str) -> bool:
        """Whether it has a part of its own by that name."""
        if part not in self._layout.parts:
            return False
        return self._data is None or bool(self._layout.files(self._data, part))

    def asked(self, part: str) -> list[Question]:
        """The questions of a part."""
        return [self.questions[example.source] for example in self.examples(part)]

    def examples(self, part: str) -> list[Example]:
        """The examples of a part, with prompts of no shots, in their order."""
        found = []
        for where, row in self._rows(part):
            try:
                question = self._benchmark.read(row)
            except TaskError as error:
                raise TaskError(f"{where}: {error}") from None
            if question is not None:
                self.questions[where] = question
                fields = row | {CATEGORY: question.category or "none"}
                found.append(Example(self._benchmark.ask(question), question.answer, fields, where))
        return found

    def task(self, examples: Iterable[Example]) -> Task:
        """A task of some examples, without a grader."""
        return Task(self._benchmark.name, tuple(examples), Grading.of(None))

    def _rows(self, part: str) -> Iterable[tuple[str, Row]]:
        patterns = self._layout.parts.get(part, ())
        folder = self._data or fetch(str(self._benchmark.hub), patterns, self._benchmark.revision)
        files = self._layout.files(folder, part) if patterns else []
        if not files:
            named = " or ".join(patterns) or f"{part} part"
            raise TaskError(f"the {part} part of {self._benchmark.name} is missing: {folder} has no {named}")
        for path in files:
            yield from layouts.read(path, self._layout, path.relative_to(folder).as_posix())


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
    copy: _Copy, names: Iterable[str], fractions: tuple[float, float, float], seed: int
) -> dict[str, tuple[Example, ...]]:
    """The examples of each part, as the publisher has divided them or as we do."""
    if copy.has(WHOLE):
        return _split(copy, WHOLE, fractions, seed)
    parts: dict[str, tuple[Example, ...]] = {}
    if not copy.has("validation") and {"train", "validation"} & set(names):
        parts = _split(copy, "train", (0.9, 0.1, 0.0), seed)
        del parts["test"]
    for name in sorted(set(names) - set(parts)):
        examples = copy.examples(name)
        random.Random(seed).shuffle(examples)
        parts[name] = tuple(examples)
    return parts


def _split(copy: _Copy, part: str, fractions: tuple[float, float, float], seed: int) -> dict[str, tuple[Example, ...]]:
    divided = copy.task(copy.examples(part)).split(*fractions, seed=seed)
    return {name: task.examples for name, task in zip(PARTS, divided)}


def _layout_of(file: Path, known: Sequence[Layout]) -> Layout:
    """The layout that a file by itself is of: one with columns where its name fits, as it has no header then."""
    for layout in known:
        names = [pattern.rpartition("/")[2] for patterns in layout.parts.values() for pattern in patterns]
        if layout.columns and any(file.match(name) for name in names if not name.startswith("*.")):
            return layout
    return Layout({})


# What `read` functions are written with


def column(row: Mapping[str, Any], *names: str) -> Any:
    """The first of these columns that a row has.

    Raises
    ------
    TaskError : where it has none.
    """
    for name in names:
        if name in row:
            return row[name]
    raise TaskError(f"no column {' or '.join(map(repr, names))} among {', '.join(map(str, row)) or 'none'}")


def text(row: Mapping[str, Any], *names: str) -> str:
    """The same, which must be text that is not empty."""
    value = column(row, *names)
    if not isinstance(value, str) or not value.strip():
        raise TaskError(f"column {names[0]!r} must be text, got {value!r:.40}")
    return value


def texts(row: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    """The same, which must be a list of such text."""
    value = column(row, *names)
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(one, str) for one in value):
        raise TaskError(f"column {names[0]!r} must be a list of text, got {value!r:.40}")
    return tuple(value)


def label(answer: Any, options: Sequence[str]) -> str:
    """The label of the right option, which is given as its label or as its index, counted from 0.

    Raises
    ------
    TaskError : for what is neither.
    """
    labels = LETTERS[: len(options)]
    known = {found: found for found in labels} | {str(at): found for at, found in enumerate(labels)}
    found = known.get(str(answer).strip()) if isinstance(answer, (str, int)) and answer is not True else None
    if found is None:
        raise TaskError(f"the answer must be one of {listed(labels)}, or its index, got {answer!r:.40}")
    return found


def listed(labels: Sequence[str]) -> str:
    """``A, B, C, or D``."""
    return ", ".join([*labels[:-1], f"or {labels[-1]}"]) if len(labels) > 1 else "".join(labels)
