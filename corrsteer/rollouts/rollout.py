"""`Rollout`: one completion of one prompt, and a line of a file that holds it. docs/rollouts.md is the schema."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal

from corrsteer.errors import CorrSteerError
from corrsteer.files import plain

Finish = Literal["stop", "length"]

FINISHES = ("stop", "length", None)


class RolloutError(CorrSteerError):
    """A mistake in a rollout or a file of them; the message is one line."""


@dataclass(frozen=True)
class Rollout:
    """One completion of one prompt.

    Attributes
    ----------
    id : unique in its file.
    prompt : text, or chat messages ``{"role": ..., "content": ...}``; None where only its tokens are known.
    prompt_ids : tokens of the prompt as the model read it, special tokens and chat template in it; None where only the
        text is known.
    completion, completion_ids : what was written, up to and without the first stop token, as text without special
        tokens and as tokens as generated. At least one is known.
    finish : ``stop`` at a stop token, ``length`` at the most new tokens; None where not known.
    rewards : finite numbers by name, of which the first is the default; empty where not graded.
    sample : which completion of its prompt, from 0.
    answer : as in `corrsteer.tasks.Example`.
    model, engine, decoding : what it was made by, where known: the model's name, the engine's with its version, and the
        settings that decide which tokens come out.
    meta : anything else, as JSON can hold it.
    source : where it stood, such as ``rollouts.jsonl:12``, for error messages; it is not written.

    Raises
    ------
    RolloutError : for what is not as said here.
    """

    id: str
    prompt: str | tuple[dict[str, Any], ...] | None
    prompt_ids: tuple[int, ...] | None
    completion: str | None
    completion_ids: tuple[int, ...] | None
    finish: Finish | None = None
    rewards: dict[str, float] = field(default_factory=dict)
    sample: int = 0
    answer: str | tuple[str, ...] | None = None
    model: str | None = None
    engine: str | None = None
    decoding: dict[str, Any] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    source: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "id": _text("id", self.id),
            "prompt": _prompt(self.prompt),
            "prompt_ids": _tokens("prompt_ids", self.prompt_ids),
            "completion": None if self.completion is None else _text("completion", self.completion, empty=True),
            "completion_ids": _tokens("completion_ids", self.completion_ids, empty=True),
            "finish": self.finish,
            "rewards": _rewards(self.rewards),
            "sample": _whole("sample", self.sample),
            "answer": _answer(self.answer),
            "model": None if self.model is None else _text("model", self.model),
            "engine": None if self.engine is None else _text("engine", self.engine),
            "decoding": None if self.decoding is None else _object("decoding", self.decoding),
            "meta": _object("meta", self.meta),
        }
        if self.finish not in FINISHES:
            raise RolloutError(f"finish must be 'stop', 'length' or None, got {self.finish!r:.40}")
        if checked["prompt"] is None and checked["prompt_ids"] is None:
            raise RolloutError("there must be a prompt, as text or messages, or its tokens in prompt_ids")
        if checked["completion"] is None and checked["completion_ids"] is None:
            raise RolloutError("there must be a completion, or its tokens in completion_ids")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def where(self) -> str:
        """What error messages call it."""
        return self.source or f"rollout {self.id!r}"

    @property
    def prompt_text(self) -> str:
        """Its prompt as a grader sees it: of chat messages the last of the user's, of tokens alone none."""
        if isinstance(self.prompt, tuple):
            said = (
                m["content"] for m in reversed(self.prompt) if m["role"] == "user" and isinstance(m["content"], str)
            )
            return next(said, "")
        return self.prompt or ""

    def to_line(self) -> str:
        """One line of JSON, with a newline at its end; what is None is left out, and rewards and meta where empty."""
        values = {name: getattr(self, name) for name in FIELDS}
        bare = [name for name in ("rewards", "meta") if not values[name]]
        kept = {name: value for name, value in values.items() if value is not None and name not in bare}
        line = json.dumps(kept, ensure_ascii=False, allow_nan=False)
        for separator in _LINE_ENDS:  # at which others may end a line
            line = line.replace(separator, f"\\u{ord(separator):04x}")
        return line + "\n"

    @classmethod
    def from_row(cls, row: Any, source: str | None = None) -> Rollout:
        """A rollout from a line's JSON. Keys that are none of a rollout's go to `meta`.

        ``reward``, a number, will do for ``rewards``, and a number for a text of ``id`` or ``answer``.
        """
        if not isinstance(row, Mapping):
            raise RolloutError(f"a line must be an object with named fields, got {type(row).__name__}")
        values = {name: row[name] for name in FIELDS if row.get(name) is not None}
        if "id" not in values:
            raise RolloutError("id is missing")
        for name, kinds in (("id", Integral), ("answer", Real)):
            if isinstance(values.get(name), kinds) and not isinstance(values[name], bool):
                values[name] = str(values[name])
        if isinstance(values.get("answer"), list):
            values["answer"] = [str(a) if _number(a) else a for a in values["answer"]]
        if row.get("reward") is not None:
            if "rewards" in values:
                raise RolloutError("reward and rewards must not both be there; put the one number among the rewards")
            values["rewards"] = {"reward": row["reward"]}
        others = {name: value for name, value in row.items() if name not in FIELDS and name != "reward"}
        meta = _object("meta", values.pop("meta", {}))
        if twice := sorted(others.keys() & meta.keys()):
            raise RolloutError(f"{twice[0]!r} must not be both in meta and beside it")
        optional: dict[str, Any] = dict.fromkeys(("prompt", "prompt_ids", "completion", "completion_ids"))
        return cls(**optional | values, meta=meta | others, source=source)


def as_chat(rollout: Rollout, system: str | None = None) -> Rollout:
    """The same with a prompt of text as the user's message in a chat, after one of the system's where there is one.

    A prompt whose tokens are known is left as it is, as it was read as these.
    """
    if not isinstance(rollout.prompt, str) or rollout.prompt_ids is not None:
        return rollout
    opening = () if system is None else ({"role": "system", "content": system},)
    return replace(rollout, prompt=(*opening, {"role": "user", "content": rollout.prompt}))


def rewarded_by(rollout: Rollout, name: str) -> Rollout:
    """The same with one of its rewards before the others."""
    if name not in rollout.rewards:
        raise RolloutError(
            f"{rollout.where}: reward must be one of {', '.join(rollout.rewards) or 'none'}, got {name!r}"
        )
    return replace(rollout, rewards={name: rollout.rewards[name], **rollout.rewards})


FIELDS = ("id", "sample", "prompt", "prompt_ids", "completion", "completion_ids", "finish", "rewards", "answer",
          "model", "engine", "decoding", "meta")  # fmt: skip
_LINE_ENDS = "\x85\u2028\u2029"


def _text(name: str, value: Any, *, empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or empty):
        raise RolloutError(f"{name} must be text{'' if empty else ' that is not empty'}, got {value!r:.40}")
    check_characters(name, value)
    return value


def check_characters(name: str, text: str) -> None:
    """Raise for a lone surrogate, which JSON and Python's strings can hold, and neither UTF-8 nor a tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RolloutError(
            f"{name} holds {text[error.start]!r} at position {error.start}, which is half of a surrogate pair or a "
            f"byte that was not UTF-8; write the character whole"
        ) from None


def _prompt(value: Any) -> str | tuple[dict[str, Any], ...] | None:
    if value is None or isinstance(value, str):
        return value if value is None else _text("prompt", value)
    if not isinstance(value, (list, tuple)) or not value:
        raise RolloutError(f"prompt must be text, or a list of chat messages, got {value!r:.40}")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise RolloutError(f"each message of prompt must have a role and a content, got {message!r:.60}")
    return tuple(_object("prompt", message) for message in value)


def _tokens(name: str, value: Any, *, empty: bool = False) -> tuple[int, ...] | None:
    if value is None:
        return None
    if hasattr(value, "tolist"):  # of NumPy or torch
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or not (value or empty):
        raise RolloutError(f"{name} must be a list of token ids{'' if empty else ', at least one'}, got {value!r:.40}")
    for at, token in enumerate(value):
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise RolloutError(f"{name} must be whole numbers of at least 0, got {token!r:.40} at position {at}")
    return tuple(value)


def _rewards(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise RolloutError(f"rewards must be numbers by name, got {value!r:.40}")
    return {_text("a reward's name", name): finite(name, reward) for name, reward in value.items()}


def finite(name: str, value: Any) -> float:
    """A reward as a float."""
    if not _number(value):
        raise RolloutError(f"reward {name!r} must be a finite number, got {value!r:.40}")
    return float(value)


def _number(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int beyond the floats
        return False


def _answer(value: Any) -> str | tuple[str, ...] | None:
    if value is None or isinstance(value, str):
        return value if value is None else _text("answer", value, empty=True)
    if not isinstance(value, (list, tuple)) or not value:
        raise RolloutError(f"answer must be text, or a list of texts, got {value!r:.40}")
    return tuple(_text("answer", one, empty=True) for one in value)


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise RolloutError(f"{name} must be a whole number of at least 0, got {value!r:.40}")
    return value


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RolloutError(f"{name} must be an object with named fields, got {value!r:.40}")
    found = plain(value)
    check_characters(name, json.dumps(found, ensure_ascii=False))
    return found


def by_name(rewards: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Rewards of samples, all of the same names, as a list for each name."""
    return {name: [of_sample[name] for of_sample in rewards] for name in rewards[0]}
