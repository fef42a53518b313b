"""Graders: a completion and its example in, a reward out.

A task names its grader:

====================  =====================================================  ==================
name                  reward is 1.0 when, else 0.0                           the answer may be
====================  =====================================================  ==================
``exact``             completion, or its first line, equals the answer       one or several
``choice``            the label the completion chose equals the answer       one or several
``number``            the completion's number equals the answer's            one
``contains``          the answer appears in the completion, any case         one or several
``regex``             the answer, a pattern, is found in the completion      one
``regex:PATTERN``     PATTERN is found in the completion                     not needed
``token_f1``          two rewards, ``match`` and ``f1``, as SQuAD has them   one or several
``refusal_phrases``   it refuses, or complies where the answer is `comply`   not needed
``length``            how many words the completion has                      not needed
``module:function``   whatever ``function(completion, example)`` returns     not needed
====================  =====================================================  ==================

Several acceptable answers are a tuple of strings; any of them will do. White space around
a completion does not count for the named graders. ``token_f1`` and ``refusal_phrases`` stand in for the models of
`corrsteer.rollouts.model_graders`, and results name them as what they are.

A function of yours takes a completion and its `Example`, and returns a finite number, or several by name:
``{"correct": 1.0, "length": 12}``. Under `batched` it takes a sequence of each, and returns a sequence. What it has as
``label`` is what provenance calls it, and what it has as ``check_answer`` is called with each example's answer. One
that rewards refusals says so by ``rewards_refusal = True``; its answers are checked as those of ``refusal_phrases``.
"""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

from corrsteer.errors import CorrSteerError
from corrsteer.tasks.examples import Example
from corrsteer.tasks.extraction import DIGITS, LETTER, Number, final_label, final_number
from corrsteer.tasks.refusals import refuses


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
    r"""The label that the completion chose equals the answer, whatever the case.

    A label is one letter or a number of at most two digits; where the answer is a letter only letters are read, and
    likewise for digits. The first of these that is there decides:

    1. the first line, if it is a label and nothing else: ``B``, ``(B)``, ``B.`` (a generation may run on);
    2. the last ``\boxed{B}``;
    3. the last ``answer is B`` or ``answer: B``, also with ``option`` or ``choice`` for ``answer``;
    4. a label at the very start, ``B because ...``, unless it reads as a word: ``A dog ...``, ``I think ...``;
    5. the last upper-case label that a bracket, a full stop or a ``*`` closes: ``(B)``, ``B.``, ``**B**``;
    6. the last upper-case letter that stands alone, unless it reads as a word;
    7. a label at the very start after all, such as ``A`` in ``A capital city``, but no ``I``.
    """
    for answer in _answers(example):
        label = _label(answer)
        if final_label(completion, LETTER if label.isalpha() else DIGITS) == label:
            return 1.0
    return 0.0


def number(completion: str, example: Example) -> float:
    r"""The completion's number equals the answer's, exactly: ``$1,200.00`` is ``1200``, and ``3/4`` is ``0.75``.

    A text's number is the first of these that there is: the one after its last ``####`` (GSM8K's mark); the last in its
    last ``\boxed{...}``; the one after its last ``answer is`` or ``answer:``, in that sentence; the last one. What
    comes after the text begins another ``Question:`` is not read. A percent sign that one side alone has may be a unit:
    ``50%`` is ``50``, and it is ``0.5``.
    """
    found = final_number(completion)
    return float(found is not None and any(found.matches(_required_number(answer)) for answer in _answers(example)))


def token_f1(completion: str, example: Example) -> dict[str, float]:
    """Two rewards by SQuAD's rules: ``match``, and the F1 score ``f1`` of the words that completion and answer share.

    Both are put in lower case, without punctuation, articles and spare white space. Of the completion the whole or its
    first line counts, and of several answers any, whichever gives the most.
    """
    text = completion.strip()
    written = [_words(text), _words(text.partition("\n")[0])]
    accepted = [_words(answer) for answer in _answers(example)]
    match = any(words == answer for words in written for answer in accepted)
    return {"match": float(match), "f1": max(_f1(words, answer) for words in written for answer in accepted)}


def refusal_phrases(completion: str, example: Example) -> float:
    """The completion refuses, as far as its wording tells, or does not where the answer is ``comply``.

    It refuses if one of the usual phrases stands in its opening. This is what there is without a model, and it is wrong
    more often than one: see `corrsteer.rollouts.model_graders.Refusal`.
    """
    return float(refuses(completion) == wants_refusal(example.answer))


def length(completion: str, example: Example) -> float:
    """How many words the completion has, set apart by white space. Of tokens a grader knows nothing."""
    return float(len(completion.split()))


def wants_refusal(answer: str | tuple[str, ...] | None) -> bool:
    """Whether a refusal is right: unless the answer says ``comply``. See `check_refusal` for what else it may be."""
    return answer is None or isinstance(answer, tuple) or answer.strip().casefold() != "comply"


def resolve(grader: str | Callable[..., Any]) -> tuple[str, Callable[..., Any], bool]:
    """Find a grader.

    Returns
    -------
    name : str
        What provenance records: the string given, or ``module:qualname`` of a callable.
    grader
    needs_answer : bool
        Whether every example must have an answer.

    Raises
    ------
    TaskError : for what is no grader, and for the name of one with a model, which this room does not load.
    """
    if callable(grader):
        named = grader if hasattr(grader, "__qualname__") else type(grader)  # partials and instances have no name
        return getattr(grader, "label", f"{named.__module__}:{named.__qualname__}"), grader, False
    if not isinstance(grader, str):
        raise TaskError(f"grader must be a name or a callable, got {type(grader).__name__}")
    if grader in _NAMED:
        return grader, _NAMED[grader], grader not in WITHOUT_ANSWER
    if grader.startswith("regex:"):
        pattern = grader.removeprefix("regex:")
        _check_pattern(pattern)
        return grader, partial(_fixed_regex, pattern), False
    if grader.partition(":")[0] in WITH_MODELS:
        raise TaskError(
            f"grader {grader!r} has a model, so give Task the grader and not its name: "
            f"corrsteer.rollouts.model_graders.named_grader({grader!r}); --grader takes the name"
        )
    if ":" in grader:
        return grader, _imported(grader), False
    raise TaskError(
        f"grader must be one of {', '.join(_NAMED)}, regex:PATTERN or module:function, or {', '.join(WITH_MODELS)}, "
        f"which have a model, got {grader!r}"
    )


def may_read_answer(grader: str) -> bool:
    """Whether a grader of this name reads the answer, or may, as a function of the user's."""
    return grader not in WITHOUT_ANSWER and not grader.startswith("regex:")


def gives_number(grader: str) -> bool:
    """Whether a grader of this name gives one reward, which is called as it is."""
    return grader in _NAMED and grader not in SEVERAL_REWARDS or grader.startswith("regex:")


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


def _label(answer: str) -> str:
    label = answer.strip().strip("().").upper()
    if not re.fullmatch(f"{LETTER}|{DIGITS}", label):
        raise TaskError(f"grader choice needs a label, one letter or a number up to 99, as the answer, got {answer!r}")
    return label


def _required_number(answer: str) -> Number:
    value = final_number(answer)
    if value is None:
        raise TaskError(f"grader number needs a number in the answer, got {answer!r}")
    return value


def _words(text: str) -> list[str]:
    """Words as SQuAD compares them."""
    bare = text.casefold().translate(dict.fromkeys(map(ord, string.punctuation)))
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def _f1(words: list[str], answer: list[str]) -> float:
    """Of words as a bag; where one side has none, whether both have none."""
    if not words or not answer:
        return float(words == answer)
    shared = sum((Counter(words) & Counter(answer)).values())
    return 2 * shared / (len(words) + len(answer))


def check_refusal(answer: str | tuple[str, ...], shared: bool) -> None:
    """Raise TaskError unless an answer is ``refuse`` or ``comply``, or clearly another grader's.

    Parameters
    ----------
    shared : whether another grader of the task may read the answer. Then it may be anything that says nothing of
        refusals, such as the label of a ``choice``.
    """
    words = [one.strip().casefold() for one in ((answer,) if isinstance(answer, str) else answer)]
    if len(words) == 1 and words[0] in ("refuse", "comply") or shared and not any(map(_ABOUT_REFUSAL.fullmatch, words)):
        return
    if {"safe", "unsafe"} & set(words):
        fix = "write comply for safe and refuse for unsafe"
    elif len(words) > 1 and {"refuse", "comply"} & set(words):
        fix = "give one of them"
    else:
        fix = "write one of them, or if another grader reads it, give that one too: --grader refusal --grader exact"
    raise TaskError(f"a grader of refusals takes the answers refuse and comply, got {answer!r}; {fix}")


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


_ABOUT_REFUSAL = re.compile("refus(e|al|ed|es|ing)|compl(y|iance|ied|ies|ying)|(un)?safe")
_NAMED: dict[str, Callable[[str, Example], float | dict[str, float]]] = {
    "exact": exact,
    "choice": choice,
    "number": number,
    "contains": contains,
    "regex": regex,
    "token_f1": token_f1,
    "refusal_phrases": refusal_phrases,
    "length": length,
}
WITHOUT_ANSWER = ("refusal_phrases", "length")
WITH_MODELS = ("refusal", "similarity", "judge")  # see `corrsteer.rollouts.model_graders`, which this room cannot know
STAND_INS = {"token_f1": "similarity", "refusal_phrases": "refusal"}  # for which grader with a model
SEVERAL_REWARDS = ("token_f1",)
_ANSWER_CHECKS: dict[str, Callable[[str], object]] = {
    "choice": _label,
    "number": _required_number,
    "contains": _check_text,
    "regex": _check_pattern,
    "token_f1": _check_text,
}
