"""`Task`: rows of JSONL or of a Hugging Face dataset become prompts with answers and graders."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corrsteer.arguments import number, whole
from corrsteer.tasks.examples import Example
from corrsteer.tasks.graders import TaskError, one_line
from corrsteer.tasks.grading import GraderSpec, Grading
from corrsteer.tasks.identity import TaskIdentity, fingerprint, pack_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """Examples and the graders that score their completions.

    ``grading`` holds the graders, ``part`` says which part of a task it is, such as ``train``. ``category_field``
    is the key of `Example.fields` that holds an example's category, None where there are none. ``options`` are the
    labels of what there is to choose from, such as A to D; None where an answer is free. ``dataset`` is where a
    benchmark's examples were read on the hub, as ``NAME@COMMIT``, for provenance alone.
    """

    name: str
    examples: tuple[Example, ...]
    grading: Grading
    chat: bool = False
    system: str | None = None
    part: str = "all"
    category_field: str | None = None
    options: tuple[str, ...] | None = None
    dataset: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.system is not None and not self.chat:
            raise TaskError("system is a chat message: pass chat=True with it, or put it in the prompts")

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def identity(self) -> TaskIdentity:
        """What its results remember of it."""
        prints = fingerprint(self.examples, self.chat, self.system)
        return TaskIdentity(self.name, self.part, self.grader_name, self.grading.default, len(self), prints)

    def samples(self, which: Iterable[int] | None = None) -> dict[str, Any]:
        """A record of its samples, or those numbered, for provenance: small, and enough to know each again."""
        chosen = self.examples if which is None else [self.examples[at] for at in which]
        hashes = pack_prompts(example.prompt for example in chosen)
        found = {"task": self.name, "part": self.part, "n": len(chosen), "prompt_hashes": hashes}
        return found if self.dataset is None else found | {"dataset": self.dataset}

    @property
    def grader_name(self) -> str:
        """What provenance records of the graders: ``number``, or ``correct=number, length=my_graders:length``."""
        return str(self.grading)

    def grade(self, completions: Sequence[str], examples: Sequence[Example]) -> list[dict[str, float]]:
        """Rewards by name of a batch of completions, which belong to as many of the task's examples.

        Every completion has the same names in the same order, and finite numbers. The first is the default reward.

        Raises
        ------
        TaskError : for a grader that fails or returns something else, with the example where that is known; and for a
            task without a grader.
        """
        return self.grading.grade(completions, examples)

    def rewards(self, completions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """The default reward of each of a batch of completions; otherwise as `grade`."""
        return [next(iter(rewards.values())) for rewards in self.grade(completions, examples)]

    def reward(self, completion: str, example: Example) -> float:
        """The default reward of one completion; otherwise as `grade`."""
        return self.rewards([completion], [example])[0]

    def rewarded_by(self, name: str) -> Task:
        """The same task with another of its rewards as the default.

        Raises
        ------
        TaskError : where no grader gives it. What a function returns is known once it is called, so this may also be
            raised by `grade`.
        """
        return replace(self, grading=self.grading.rewarded_by(name))

    def graded_by(self, grader: GraderSpec) -> Task:
        """The same examples with other graders, given as to `from_rows`.

        Raises
        ------
        TaskError : for what is no grader, or an example whose answer a grader cannot do with.
        """
        grading = Grading.of(grader)
        for example in self.examples:
            if example.answer is None and grading.needs_answer:
                raise TaskError(f"{example.source}: no answer, and grader {grading.needs_answer} needs one")
            try:
                if example.answer is not None:
                    grading.check_answer(example.answer)
            except TaskError as error:
                raise TaskError(f"{example.source}: {error}") from None
        return replace(self, grading=grading)

    def category(self, example: Example) -> str | None:
        """Of which category an example is; None where the task has none."""
        if self.category_field is None:
            return None
        try:
            return _category(example.fields, self.category_field)
        except TaskError as error:
            raise TaskError(f"{example.source}: {error}") from None

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Each example's prompt as the model reads it.

        With ``chat=True`` it is rendered by the tokenizer's chat template, special tokens included: tokenise the
        result with ``add_special_tokens=False``.
        """
        if not self.chat:
            return [example.prompt for example in self.examples]
        if getattr(tokenizer, "chat_template", None) is None:
            raise TaskError("chat=True needs a tokenizer with a chat_template, and this one has none: use chat=False")
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        rendered = []
        for example in self.examples:
            messages = [*opening, {"role": "user", "content": example.prompt}]
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # a template raises as it likes, as some do on a system message
                raise TaskError(f"{example.source}: the chat template failed: {one_line(error)}") from error
            rendered.append(text)
        return rendered

    def split(
        self, train: float = 0.8, validation: float = 0.1, test: float = 0.1, seed: int = 0
    ) -> tuple[Task, Task, Task]:
        """Shuffle into train, validation and test tasks that share no prompt.

        The fractions count distinct prompts: examples with the same prompt go to the same split. With few prompts
        a split may be empty.
        """
        fractions = {"train": train, "validation": validation, "test": test}
        train, validation, test = (number(name, fraction, 0) for name, fraction in fractions.items())
        if train + validation + test > 1 + 1e-9:
            raise TaskError(f"train + validation + test must be at most 1, got {train} + {validation} + {test}")
        seed = whole("seed", seed, 0)

        by_prompt: dict[str, list[Example]] = {}
        for example in self.examples:
            by_prompt.setdefault(example.prompt, []).append(example)
        groups = list(by_prompt.values())
        random.Random(seed).shuffle(groups)

        first = round(len(groups) * train)
        second = round(len(groups) * (train + validation))
        third = round(len(groups) * (train + validation + test))

        def part(name: str, groups: list[list[Example]]) -> Task:
            name = name if self.part == "all" else f"{self.part}/{name}"
            return replace(self, examples=tuple(example for group in groups for example in group), part=name)

        return (
            part("train", groups[:first]),
            part("validation", groups[first:second]),
            part("test", groups[second:third]),
        )

    def take(self, n: int) -> Task:
        """The first n examples, or all if there are fewer."""
        return replace(self, examples=self.examples[: whole("n", n, 0)])

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        grader: GraderSpec = "exact",
        name: str = "task",
        prompt_field: str = "prompt",
        answer_field: str | None = "answer",
        category_field: str | None = None,
        chat: bool = False,
        system: str | None = None,
        source: str | None = None,
    ) -> Task:
        """Read mappings with a prompt and, where the grader needs it, an answer.

        Parameters
        ----------
        rows
            A prompt is a non-empty string. An answer is a string, a number or a list of these.
        grader
            A name of `corrsteer.tasks.graders`, ``regex:PATTERN``, ``module:function``, or a callable; or several of
            these by the names of their rewards, of which the first is the default. None for a task without rewards.
        answer_field
            None leaves every key but the prompt in `Example.fields`, for graders that need no answer.
        category_field
            What `evaluate` also gives results by, such as a subject: a string or a number in every row.
        system
            A system message before each prompt, with ``chat=True``.
        source
            What error messages call the rows, ``name`` if not given. The first row is number 1.
        """
        source = source or name
        numbered = ((f"{source}:{number}", row) for number, row in enumerate(rows, start=1))
        examples, grading = _read(numbered, grader, prompt_field, answer_field, category_field, source)
        return cls(name, examples, grading, chat, system, category_field=category_field)

    @classmethod
    def from_jsonl(
        cls,
        path: str | os.PathLike[str],
        grader: GraderSpec = "exact",
        name: str | None = None,
        prompt_field: str = "prompt",
        answer_field: str | None = "answer",
        category_field: str | None = None,
        chat: bool = False,
        system: str | None = None,
        source: str | None = None,
    ) -> Task:
        """Read a UTF-8 file with one JSON object a line, as `from_rows` does. Blank lines are skipped.

        ``name`` is the file's stem if not given, ``source`` the file's name.
        """
        path = Path(path)
        source = source or path.name
        lines = _numbered_lines(path, source)
        examples, grading = _read(lines, grader, prompt_field, answer_field, category_field, source, parse=_parse_line)
        return cls(name or path.stem, examples, grading, chat, system, category_field=category_field)

    @classmethod
    def from_dataset(
        cls,
        name_or_path: Any,
        config: str | None = None,
        split: str = "train",
        grader: GraderSpec = "exact",
        name: str | None = None,
        prompt_field: str = "prompt",
        answer_field: str | None = "answer",
        category_field: str | None = None,
        chat: bool = False,
        system: str | None = None,
        source: str | None = None,
    ) -> Task:
        """Read a Hugging Face dataset, as `from_rows` does. Needs the `datasets` package.

        Parameters
        ----------
        name_or_path
            A dataset of the Hub, a folder written by ``save_to_disk``, anything else that
            ``datasets.load_dataset`` takes, or a dataset already loaded (mapped, say, to have prompts).
        split
            Which split to read; a dataset already loaded or saved as one split is read as it is.
        """
        rows, origin = _open_dataset(name_or_path, config, split)
        rows = _pick_split(rows, split, origin)
        read_split = getattr(rows, "split", None)
        source = source or (f"{origin}[{read_split}]" if read_split else origin)
        return cls.from_rows(
            rows, grader, name or origin, prompt_field, answer_field, category_field, chat, system, source
        )


def _read(
    numbered: Iterable[tuple[str, Any]],
    grader: GraderSpec,
    prompt_field: str,
    answer_field: str | None,
    category_field: str | None,
    source: str,
    parse: Callable[[Any], Any] = lambda row: row,
) -> tuple[tuple[Example, ...], Grading]:
    """Turn (source, row) pairs into examples, or report the first bad row and how many more there are."""
    grading = Grading.of(grader)
    if grading.needs_answer and answer_field is None:
        raise TaskError(f"answer_field must name the answer's field: grader {grading.needs_answer} needs an answer")
    examples, bad = [], []
    for where, row in numbered:
        try:
            row = parse(row)
            prompt = _prompt(row, prompt_field)
            answer = _answer(row, answer_field, grading.needs_answer is not None)
            if answer is not None:
                grading.check_answer(answer)
            if category_field is not None:
                _category(row, category_field)
        except TaskError as error:
            bad.append(f"{where}: {error}")
        else:
            taken = {prompt_field, answer_field} - {category_field}
            fields = {key: value for key, value in row.items() if key not in taken}
            examples.append(Example(prompt, answer, fields, where))
    if bad:
        more = f" (and {len(bad) - 1} more bad)" if len(bad) > 1 else ""
        raise TaskError(bad[0] + more)
    if not examples:
        raise TaskError(f"{source} has no examples")
    return tuple(examples), grading


def _prompt(row: Any, key: str) -> str:
    if not isinstance(row, Mapping):
        raise TaskError(f"a row must be an object with named fields, got {type(row).__name__}")
    if key not in row:
        raise TaskError(f"no field {key!r} among {', '.join(map(str, row)) or 'none'}: set prompt_field")
    if not isinstance(row[key], str) or not row[key].strip():
        raise TaskError(f"the prompt, field {key!r}, must be a non-empty string, got {row[key]!r:.40}")
    _check_characters("prompt", key, row[key])
    return row[key]


def _answer(row: Mapping[str, Any], key: str | None, needed: bool) -> str | tuple[str, ...] | None:
    value = None if key is None else row.get(key)
    if value is None:
        if needed:
            fields = ", ".join(map(str, row))
            raise TaskError(f"no answer: field {key!r} is missing or null among {fields}: set answer_field")
        return None
    if _is_answer(value):
        _check_characters("answer", key, str(value))
        return str(value)
    if isinstance(value, (list, tuple)) and value and all(map(_is_answer, value)):
        _check_characters("answer", key, "".join(map(str, value)))
        return str(value[0]) if len(value) == 1 else tuple(map(str, value))
    advice = "set answer_field" if needed else "or pass answer_field=None to keep it in fields"
    raise TaskError(
        f"the answer, field {key!r}, must be a string, a number or a list of these, got {value!r:.40}: {advice}"
    )


def _category(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None or value != value:  # NaN is how tables say that there is none
        fields = ", ".join(map(str, row)) or "none"
        raise TaskError(
            f"no category: field {key!r} is missing or null among {fields}: set category_field, or leave it out"
        )
    if not isinstance(value, (str, Real)) or not str(value).strip():
        raise TaskError(f"the category, field {key!r}, must be a non-empty string or a number, got {value!r:.40}")
    return str(value)


def _check_characters(what: str, key: str | None, text: str) -> None:
    """Raise for a lone surrogate, which JSON and Python's strings can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TaskError(
            f"the {what}, field {key!r}, holds {text[error.start]!r} at position {error.start}, which is half of a "
            f"surrogate pair or a byte that was not UTF-8; write the character whole"
        ) from None


def _is_answer(value: Any) -> bool:
    # Not bool: whether true is to read "True", "true" or "yes" is the task's to say.
    return isinstance(value, (str, Real)) and not isinstance(value, bool)


def _numbered_lines(path: Path, source: str) -> Iterator[tuple[str, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{source}:{number}", line
    except OSError as error:
        raise TaskError(f"cannot read {path}: {error.strerror}") from error


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))  # -sig: editors on Windows open a file with a byte order mark
    except UnicodeDecodeError as error:
        raise TaskError(f"not UTF-8: byte {line[error.start]:#04x} at position {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise TaskError(f"not JSON: {error}") from error


def _open_dataset(name_or_path: Any, config: str | None, split: str) -> tuple[Any, str]:
    """The dataset, perhaps one with several splits, and what to call it."""
    if not isinstance(name_or_path, (str, os.PathLike)):
        return name_or_path, "dataset"
    try:
        import datasets
    except ImportError as error:
        raise TaskError(f"reading {name_or_path} needs the datasets package: pip install datasets") from error
    folder = Path(name_or_path)
    origin = folder.name if folder.is_dir() else str(name_or_path)
    origin = f"{origin}/{config}" if config else origin
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():  # save_to_disk's marks
            return datasets.load_from_disk(str(folder)), origin
        return datasets.load_dataset(str(name_or_path), config, split=split), origin
    except Exception as error:  # the library and a dataset's own reader raise many kinds
        raise TaskError(f"cannot load dataset {origin}: {one_line(error)}") from error


def _pick_split(rows: Any, split: str, origin: str) -> Any:
    if isinstance(rows, Mapping):
        if split not in rows:
            raise TaskError(f"split of {origin} must be one of {', '.join(rows)}, got {split!r}")
        return rows[split]
    if not isinstance(rows, Iterable):
        raise TaskError(f"name_or_path must be a name, a folder or a dataset, got {type(rows).__name__}")
    return rows
