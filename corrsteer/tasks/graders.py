"""Graders: a completion and its example in, a reward out.

A task names its grader:

===================  =======================================================  ==================
name                 reward is 1.0 when, else 0.0                             the answer may be
===================  =======================================================  ==================
``exact``            completion, or its first line, equals the answer         one or several
``choice``           the label the completion chose equals the answer         one or several
``number``           the completion's number equals the answer's               one
``contains``         the answer appears in the completion, any case           one or several
``regex``            the answer, a pattern, is found in the completion        one
``regex:PATTERN``    PATTERN is found in the completion                       not needed
``module:function``  whatever ``function(completion, example)`` returns       not needed
===================  =======================================================  ==================

Several acceptable answers are a tuple of strings; any of them will do. White space around
a completion does not count for the named graders.

A function of yours takes a completion and its `Example`, and returns a finite number, or several by name:
``{"correct": 1.0, "length": 12}``. Under `batched` it takes a sequence of each, and returns a sequence.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from decimal import Decimal
from functools import partial, reduce
from typing import Any

from corrsteer.errors import CorrSteerError
from corrsteer.tasks.examples import Example


class TaskError(CorrSteerError):
    """A mistake in a task's data, settings or grader; the message is one line."""


def one_line(error: Exception) -> str:
    """An error in a line, with its kind unless its message says enough."""
    text = str(error) if isinstance(error, TaskError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def exact(completion: str, example: Example) -> float:
    """Completion equals the answer, in case too. Its first line is enough, because a generation may run on."""
    text = completion.strip()
    first_line = text.partition("\n")[0].strip()
    return float(any(answer.strip() in (text, first_line) for answer in _answers(example)))


def contains(completion: str, example: Example) -> float:
    """An answer appears somewhere in the completion, whatever the case."""
    text = completion.casefold()
    return float(any(answer.strip().casefold() in text for answer in _answers(example)))


def regex(completion: str, example: Example) -> float:
    """The example's answer, as a pattern, is found in the stripped completion."""
    return float(any(_search(pattern, completion) for pattern in _answers(example)))


def choice(completion: str, example: Example) -> float:
    """The label that the completion chose equals the answer, whatever the case.

    A label is one letter or a number of at most two digits; where the answer is a letter only letters are read, and
    likewise for digits. The first of these that is there decides:

    1. the first line, if it is a label and nothing else: ``B``, ``(B)``, ``B.`` (a generation may run on);
    2. the last ``answer is B`` or ``answer: B``;
    3. a label at the very start, ``B because ...``, unless it reads as a word: ``A dog ...``, ``I think ...``;
    4. the last upper-case label that a bracket, a full stop or a ``*`` closes: ``(B)``, ``B.``, ``**B**``;
    5. a label at the very start after all.
    """
    for answer in _answers(example):
        label = _label(answer)
        if _chosen(completion, _LETTER if label.isalpha() else _DIGITS) == label:
            return 1.0
    return 0.0


def number(completion: str, example: Example) -> float:
    """The completion's number equals the answer's, as decimals: ``$1,200.00`` is ``1200``.

    A text's number is the one after its first ``####`` (GSM8K's mark), else the last one in it.
    """
    return float(any(_number(completion) == _required_number(answer) for answer in _answers(example)))


def resolve(grader: str | Callable[..., Any]) -> tuple[str, Callable[..., Any], bool]:
    """Find a grader.

    Returns
    -------
    name : str
        What provenance records: the string given, or ``module:qualname`` of a callable.
    grader
    needs_answer : bool
        Whether every example must have an answer.
    """
    if callable(grader):
        named = grader if hasattr(grader, "__qualname__") else type(grader)  # partials and instances have no name
        return f"{named.__module__}:{named.__qualname__}", grader, False
    if not isinstance(grader, str):
        raise TaskError(f"grader must be a name or a callable, got {type(grader).__name__}")
    if grader in _NAMED:
        return grader, _NAMED[grader], True
    if grader.startswith("regex:"):
        pattern = grader.removeprefix("regex:")
        _check_pattern(pattern)
        return grader, partial(_fixed_regex, pattern), False
    if ":" in grader:
        return grader, _imported(grader), False
    raise TaskError(f"grader must be one of {', '.join(_NAMED)}, regex:PATTERN or module:function, got {grader!r}")


def check_answer(grader_name: str, answer: str | tuple[str, ...]) -> None:
    """Raise TaskError if the named grader could never match this answer, or would match anything."""
    if grader_name in ("number", "regex") and not isinstance(answer, str):
        raise TaskError(f"grader {grader_name} takes one answer, got {len(answer)}")
    if grader_name in _ANSWER_CHECKS:
        for one in (answer,) if isinstance(answer, str) else answer:
            _ANSWER_CHECKS[grader_name](one)


def _answers(example: Example) -> tuple[str, ...]:
    if example.answer is None:
        raise TaskError("the example has no answer, and this grader needs one")
    return (example.answer,) if isinstance(example.answer, str) else example.answer


def _check_text(answer: str) -> None:
    if not answer.strip():
        raise TaskError("the answer is empty, and every completion contains it")


def _check_pattern(pattern: str) -> None:
    if not pattern:
        raise TaskError("the regex pattern is empty, and every completion matches it")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise TaskError(f"regex pattern {pattern!r} is invalid: {error}") from error


def _search(pattern: str, completion: str) -> bool:
    # Stripped, because most completions open with a space, and ^yes should see " yes".
    return re.search(pattern, completion.strip()) is not None


def _fixed_regex(pattern: str, completion: str, example: Example) -> float:
    return float(_search(pattern, completion))


_LETTER, _DIGITS = "[A-Za-z]", "[0-9]{1,2}"
_OPEN = r"""[(\[{*"']*"""
_CLOSE = r"""[)\]}*"'.:,]*"""
_END = r"(?!['’]?\w|[.,]\d)"  # neither "I'm" nor "3.5" holds a label
_CHOICE_PATTERNS = (  # numbered in the docstring of choice; the lookbehinds tell the article A and the pronoun I
    rf"\A{_OPEN}(LABEL){_CLOSE}[ \t\r]*(?:\n|\Z)",
    rf"(?i:\banswer\s*(?:is|:|=)[\s:*]*(?:(?:option|choice)\s+)?){_OPEN}(LABEL){_END}(?!(?<=[ai])[ \t]+\w)",
    rf"\A{_OPEN}(LABEL){_END}(?!(?<=[AaIi])[ \t]+\w)",
    r"(?<![\w.])(?![a-z])(LABEL)[.)\]}*](?!\w)",
    rf"\A{_OPEN}(LABEL){_END}",
)


def _label(answer: str) -> str:
    label = answer.strip().strip("().").upper()
    if not re.fullmatch(f"{_LETTER}|{_DIGITS}", label):
        raise TaskError(f"grader choice needs a label, one letter or a number up to 99, as the answer, got {answer!r}")
    return label


def _chosen(completion: str, kind: str) -> str | None:
    text = completion.strip()
    for pattern in _CHOICE_PATTERNS:
        found = re.findall(pattern.replace("LABEL", kind), text)
        if found:
            return found[-1].upper()
    return None


_NUMBER = re.compile(
    r"(?:(?<![\w)\]%-])[-−])?"  # a minus, not the dash of 3-5
    r"[$€£]?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?!\w))?"
)


def _number(text: str) -> Decimal | None:
    marked = re.search(rf"####[ \t]*({_NUMBER.pattern})", text)
    found = [marked[1]] if marked else _NUMBER.findall(text)
    return Decimal(re.sub("[$€£,]", "", found[-1]).replace("−", "-")) if found else None


def _required_number(answer: str) -> Decimal:
    value = _number(answer)
    if value is None:
        raise TaskError(f"grader number needs a number in the answer, got {answer!r}")
    return value


def _imported(path: str) -> Callable[..., Any]:
    module, _, function = path.partition(":")
    try:
        found = reduce(getattr, function.split("."), importlib.import_module(module))
    except AttributeError as error:
        raise TaskError(f"grader {path!r}: {error}") from error
    except Exception as error:  # importing runs the user's module, which may raise anything
        raise TaskError(
            f"grader {path!r} cannot be imported (is it installed or on PYTHONPATH?): {one_line(error)}"
        ) from error
    if not callable(found):
        raise TaskError(f"grader {path!r} must be callable, got {type(found).__name__}")
    return found


_NAMED: dict[str, Callable[[str, Example], float]] = {
    "exact": exact,
    "choice": choice,
    "number": number,
    "contains": contains,
    "regex": regex,
}
_ANSWER_CHECKS: dict[str, Callable[[str], object]] = {
    "choice": _label,
    "number": _required_number,
    "contains": _check_text,
    "regex": _check_pattern,
}
