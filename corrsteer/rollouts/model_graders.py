"""Graders with a model, by name: what stands behind ``refusal``, ``similarity`` and ``judge``.

A name may have options after a colon, parted by commas: ``refusal:model=DIR,threshold=0.7``. They are the parameters of
`Refusal`, `Similarity` and `Judge`. A judge has its address first, and its prompt in a file:
``judge:http://localhost:8000/v1,model=NAME,prompt=FILE``.

`corrsteer.tasks` knows no models. So the command line, and whoever builds a task in Python, gives it the graders.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from corrsteer.errors import CorrSteerError
from corrsteer.rollouts.classifiers import Refusal, Similarity
from corrsteer.rollouts.judge import Judge
from corrsteer.tasks import GraderSpec
from corrsteer.tasks.graders import WITH_MODELS

__all__ = ["Judge", "Refusal", "Similarity", "named_grader", "with_models"]

ModelGrader = Judge | Refusal | Similarity

_KINDS: dict[str, Callable[..., ModelGrader]] = {"refusal": Refusal, "similarity": Similarity, "judge": Judge}
assert set(_KINDS) == set(WITH_MODELS)


def with_models(grader: GraderSpec, device: str = "auto") -> GraderSpec:
    """What a task takes, of what may hold names of graders with models; everything else stays as it is.

    Parameters
    ----------
    device : of classifiers that name none.

    Raises
    ------
    CorrSteerError : as `named_grader`.
    """
    if isinstance(grader, Mapping):
        return {name: _one(one, device) for name, one in grader.items()}
    return _one(grader, device)


def named_grader(name: str, device: str = "auto") -> ModelGrader:
    """The grader with a model of a name and its options, loaded.

    Raises
    ------
    CorrSteerError : for another name, an option that it does not have, and a model that is not there.
    """
    kind, _, given = name.partition(":")
    if kind not in _KINDS:
        raise CorrSteerError(f"a grader with a model must be one of {', '.join(_KINDS)}, got {name!r}")
    words = [word.strip() for word in given.split(",")] if given else []
    if kind == "judge":
        if not words or "=" in words[0] or "model" not in {word.partition("=")[0] for word in words}:
            got = re.sub(r"\bkey=[^,]*", "key=...", name)  # where a key itself may stand
            raise CorrSteerError(f"grader judge must be judge:URL,model=NAME and its options, got {got!r}")
        return Judge(words[0], **_judge_options(_options(kind, Judge, words[1:])))
    return _KINDS[kind](**{"device": device} | _options(kind, Refusal if kind == "refusal" else Similarity, words))


def _one(grader: Any, device: str) -> Any:
    has_model = isinstance(grader, str) and grader.partition(":")[0] in _KINDS
    return named_grader(grader, device) if has_model else grader


def _options(kind: str, grader: type[ModelGrader], words: list[str]) -> dict[str, Any]:
    known = {field.name: str(field.type) for field in fields(grader) if field.name not in ("url", "prompt_name")}
    found: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise CorrSteerError(f"grader {kind} has no option {word!r}; {hint}")
        if not value or name in found:
            raise CorrSteerError(f"grader {kind} must have each option once, as {name}=VALUE, got {word!r}")
        found[name] = _value(kind, name, value, known[name])
    return found


def _value(kind: str, name: str, value: str, annotation: str) -> Any:
    if value == "none" and "None" in annotation:
        return None
    if "Path" in annotation:
        return Path(value)
    read = int if annotation.startswith("int") else float if annotation.startswith("float") else str
    try:
        return read(value)
    except ValueError:
        raise CorrSteerError(f"{name} of grader {kind} must be a number, got {value!r}") from None


def _judge_options(options: dict[str, Any]) -> dict[str, Any]:
    """Its prompt is a file's text."""
    if "prompt" not in options:
        return options
    path = Path(options["prompt"])
    try:
        return options | {"prompt": path.read_text(encoding="utf-8"), "prompt_name": path.name}
    except (OSError, UnicodeDecodeError) as error:
        raise CorrSteerError(f"prompt {path} of grader judge cannot be read: {error}; give a UTF-8 text file") from None
