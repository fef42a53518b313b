"""Settings of the command line: one model a command, read from YAML, overridden by flags, checked by pydantic."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from corrsteer.errors import CorrSteerError

Part = Literal["all", "train", "validation", "test"]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TaskSettings(_Settings):
    """A task: its rows, its grader, and which part of it."""

    task: str
    grader: str = "exact"
    split: str = "train"
    prompt_field: str = "prompt"
    answer_field: str | None = "answer"
    chat: bool = False
    system: str | None = None
    part: Part = "all"
    split_seed: int = 0
    limit: int | None = Field(default=None, ge=1)


class ModelSettings(_Settings):
    """A model and how it generates."""

    model: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    max_new_tokens: int = Field(default=32, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = 0
    batch_tokens: int = Field(default=16384, ge=1)
    batch_size: int = Field(default=256, ge=1)


class CollectSettings(TaskSettings, ModelSettings):
    """What `corrsteer collect` needs."""

    sae: list[str] = Field(min_length=1)
    out: Path
    pool: Literal["max", "mean"] = "max"
    coefficient_pool: Literal["max", "mean"] | None = None
    positions: Literal["generated", "all"] = "generated"
    hook_offset: int = 0
    permutations: int = Field(default=1000, ge=0)
    bootstrap: int = Field(default=0, ge=0)
    score: list[str] = ["pearson"]
    block_size: int = Field(default=512, ge=1)
    shuffle_seed: int = Field(default=0, ge=0)
    patience: int | None = Field(default=None, ge=1)
    statistics_bytes: int = Field(default=16 << 30, ge=1)
    buffer_bytes: int = Field(default=1 << 30, ge=1)
    precision: Literal["fp32", "bf16x2", "bf16", "fp16"] | None = None
    backend: str | None = None
    part: Part = "train"

    @field_validator("sae", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        """In YAML a mapping of layers to sources, or a single LAYER=SOURCE, will do."""
        if isinstance(value, dict):
            return [f"{layer}={source}" for layer, source in value.items()]
        return [value] if isinstance(value, str) else value

    @field_validator("score", mode="before")
    @classmethod
    def _scores(cls, value: Any) -> Any:
        """In YAML a single name will do."""
        return [value] if isinstance(value, str) else value


class EvaluateSettings(TaskSettings, ModelSettings):
    """What `corrsteer evaluate` needs; `corrsteer select --strategy pruned` uses it for its validation."""

    positions: Literal["generated", "all", "prompt"] = "generated"
    scale: float = 1.0
    part: Part = "test"


S = TypeVar("S", bound=_Settings)


def read(kind: type[S], config: Path | None, flags: dict[str, Any], defaults: dict[str, Any] | None = None) -> S:
    """Settings from `defaults`, a YAML file over them, and flags (None where not given) over both.

    Raises
    ------
    CorrSteerError : for a file that is not a YAML mapping, an unknown or missing setting, or a bad value.
    """
    values = {name: value for name, value in (defaults or {}).items() if name in kind.model_fields}
    if config is not None:  # one file may serve several commands
        values |= {name: value for name, value in _yaml(config).items() if name in kind.model_fields}
    values |= {name: value for name, value in flags.items() if value is not None}
    try:
        return kind(**values)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            name = ".".join(map(str, problem["loc"]))
            if problem["type"] == "missing":
                problems.append(f"{name} is missing: give --{name.replace('_', '-')} or put it in the YAML file")
            else:
                problems.append(f"{name}: {problem['msg']}, got {problem['input']!r}")
        raise CorrSteerError("; ".join(problems)) from None


def _yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise CorrSteerError(f"config {path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise CorrSteerError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise CorrSteerError(f"config {path} must be a mapping of settings, got {type(values).__name__}")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    known = CollectSettings.model_fields | EvaluateSettings.model_fields
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(sorted(known))}"
            raise CorrSteerError(f"config {path} has an unknown setting {name!r}; {hint}")
    return values
