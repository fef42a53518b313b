r"""What a completion says its answer is: a number, or the label of an option.

`final_number` reads a text as people write numbers, first made plain: ``\frac{3}{4}`` is ``3/4``, ``1{,}200`` is
``1,200``, ``2 × 10^3`` is ``2e3``. The published ways to read GSM8K and MMLU-Pro are compared with these two functions,
answer by answer, in ``tests/tasks/awkward_answers.py``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction


@dataclass(frozen=True)
class Number:
    """A number as it stands in a text: its value without the percent sign, and whether it has one."""

    value: Fraction
    percent: bool = False

    def matches(self, other: Number) -> bool:
        """Whether both say the same. A percent sign that only one has may be a unit: 50% is 50, and it is 0.5."""
        if self.percent == other.percent:
            return self.value == other.value
        plain, percent = (other, self) if self.percent else (self, other)
        return plain.value in (percent.value, percent.value / 100)


def final_number(text: str) -> Number | None:
    r"""The number that a text gives as its answer, None where there is none. The first of these that there is:

    1. the number after the last ``####`` (GSM8K's mark);
    2. the last in the last ``\boxed{...}``;
    3. the one after the last ``answer is`` or ``answer:``, in the same sentence; of a sum its result;
    4. the last in the text.

    What comes after the text begins another ``Question:`` is not read.
    """
    text = _plain(_one_turn(text))
    for read in (_after_mark, _in_box, _after_answer_is, _last):
        found = read(text)
        if found is not None:
            return found
    return None


def final_label(text: str, kind: str) -> str | None:
    r"""The label that a text chose, in upper case, None where it chose none.

    Parameters
    ----------
    kind : `LETTER` or `DIGITS`: which labels are read. The rules are those of `corrsteer.tasks.graders.choice`.
    """
    text = _boxes_opened(text.strip())
    for pattern in _LABEL_PATTERNS:
        if pattern == _ALONE and kind != LETTER:
            continue  # of numbers too many stand alone
        found = re.findall(pattern.replace("LABEL", kind), text)
        if found:
            return found[-1].upper()
    return None


# Numbers

# A sign is not the dash of 3-5; digits are grouped by thousands or, as in India, by lakhs; a fraction stands alone or
# after a whole number, and is no date.
_GROUPED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d+)"
_DECIMAL = rf"(?:{_GROUPED}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}}(?!\w))?"
_FRACTION = (
    r"(?<!\d/)(?:(?P<whole>\d{1,3})[ ]+)?"
    r"(?P<above>\d+(?:\.\d+)?)[ ]?/[ ]?(?=[\d.]*[1-9])(?P<below>\d+(?:\.\d+)?)(?![\d/])"
)
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]%-])-)?(?P<currency>[$€£¥₹]-?)?(?:{_FRACTION}|(?P<decimal>{_DECIMAL}))(?P<percent>[ ]?%)?"
)
_OPERATOR = re.compile(r"(?:[ ]+[A-Za-z]+){0,2}[ ]*[-=+*/×÷·^x][ ]*\(?[$€£¥₹]?-?\.?\d")  # after what is no result yet
_ANSWER_IS = re.compile(r"(?i)\banswer\b[*]*[ ]*(?:is|:|=)[\s:*]*((?:[^.!?\n]|[.!?](?!\s|\Z))*)")


def _last(text: str) -> Number | None:
    found = list(_NUMBER.finditer(text))
    return _value(found[-1]) if found else None


def _after_mark(text: str) -> Number | None:
    found = [number for mark in re.finditer(r"####[ \t]*", text) if (number := _NUMBER.match(text, mark.end()))]
    return _value(found[-1]) if found else None


def _in_box(text: str) -> Number | None:
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return _last(boxes[-1]) if boxes else None


def _after_answer_is(text: str) -> Number | None:
    """The first number of the sentence that is no operand: `5 + 7 = 12, as ...` gives 12."""
    for sentence in reversed(_ANSWER_IS.findall(text)):
        found = list(_NUMBER.finditer(sentence))
        results = [number for number in found if not _OPERATOR.match(sentence, number.end())]
        if found:
            return _value((results or found)[0])
    return None


def _value(found: re.Match[str]) -> Number:
    if found["decimal"]:
        value = _fraction(found["decimal"].replace(",", ""))
    else:
        value = _fraction(found["whole"] or "0") + _fraction(found["above"]) / _fraction(found["below"])
    negative = found["sign"] or (found["currency"] or "").endswith("-")
    return Number(-value if negative else value, found["percent"] is not None)


def _fraction(digits: str) -> Fraction:
    return Fraction(Decimal(digits))  # which takes more digits than Python's int does, as a model may go on and on


# Plain text

_DASHES = dict.fromkeys(map(ord, "−–﹣－‐‑"), "-")  # each is used as a minus; which are is told from what stands before
_SUPERSCRIPTS = {ord(raised): plain for raised, plain in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")}

_PLAINER: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"\\(?:text|textbf|mathbf|mathrm|operatorname)\{([^{}]*)\}", r" \1 "),
    (r"(?<=\d)(?:\{,\}|\\,(?=\d{3}(?!\d)))", ","),
    (r"\\[,;:! ]|\\(?:left|right)\b|~", " "),
    (r"\\([$%])", r"\1"),
    (r"(?<=\d)[\u00a0\u2009\u202f'’](?=\d{3}(?!\d))", ","),
    (r"(?<=\d)(?=\\[dt]?frac)", " "),
    (r"\\[dt]?frac[ ]?(?:\{[ ]*(-?[\d.]+)[ ]*\}\{[ ]*([\d.]+)[ ]*\})", r"\1/\2"),
    (r"\\[dt]?frac[ ]?(\d)(\d)", r"\1/\2"),
    (r"[¼-¾⅐-⅞]", lambda m: " " + unicodedata.normalize("NFKC", m[0])),
    (r"⁄", "/"),
    (r"(?<=10)[⁰¹²³⁴-⁹⁻]{1,3}", lambda m: "^" + m[0].translate(_SUPERSCRIPTS)),
    (r"\\(?:times|cdot)\b", "×"),
    (r"\\(?:circ|degree)\b", ""),
    (r"(?<=\d)[ ]*[×x*·][ ]*10[ ]?(?:\^|\*\*)[ ]?[({]?[+]?(-?\d{1,3})[)}]?(?!\d)", r"e\1"),
    (r"(?<![\d.,^])10[ ]?(?:\^|\*\*)[ ]?[({]?[+]?(-?\d{1,3})[)}]?(?!\d)", r"1e\1"),
    (r"(?i)(?:(?<=\bis)|(?<==)|(?<=:)|\A)([\s*]*)(?:minus|negative)[ ]+(?=[$€£¥₹]?\d)", r"\1 -"),
)  # fmt: skip


def _one_turn(text: str) -> str:
    """What comes before the text goes on as examples in a prompt do."""
    return re.split(r"\n[ \t]*(?:Question|Q)[ ]?\d*:", text.strip(), maxsplit=1)[0]


def _plain(text: str) -> str:
    text = text.translate(_DASHES)
    for pattern, plain in _PLAINER:
        text = re.sub(pattern, plain, text)
    return text


# Labels

LETTER, DIGITS = "[A-Za-z]", "[0-9]{1,2}"
_OPEN = r"""[(\[{*"'$]*"""
_CLOSE = r"""[)\]}*"'.:,$]*"""
_END = r"(?!['’]?\w|[.,]\d)"  # neither "I'm" nor "3.5" holds a label
_ALONE = r"(?<![\w.'’-])(?![a-z])(LABEL)(?!['’.-]?\w)(?!(?<=[AI])[ \t]+\w)"
_LABEL_PATTERNS = (  # numbered in the docstring of choice; the lookbehinds tell the article A and the pronoun I
    rf"\A{_OPEN}(LABEL){_CLOSE}[ \t\r]*(?:\n|\Z)",
    r"{\[(LABEL)\]}",
    r"(?i:\b(?:answer|option|choice)\s*(?:is|:|=)[\s:*]*(?:(?:option|choice)\s+)?)"
    rf"{_OPEN}(LABEL){_END}(?!(?<=[ai])[ \t]+\w)",
    rf"\A{_OPEN}(LABEL){_END}(?!(?<=[AaIi])[ \t]+\w)",
    r"(?<![\w.])(?![a-z])(LABEL)[.)\]}*](?!\w)",
    _ALONE,
    rf"\A{_OPEN}(LABEL){_END}(?!(?<=[Ii])[ \t]+\w)",
)


def _boxes_opened(text: str) -> str:
    r"""``\boxed{\text{(B)}}`` as ``{[B]}``, which nobody else writes."""
    label = rf"(?:\\(?:text|textbf|mathbf|mathrm)\{{)?{_OPEN}({LETTER}|{DIGITS}){_CLOSE}"
    return re.sub(rf"\\boxed\{{[ ]*{label}[ ]*\}}?", r"{[\1]}", text)
