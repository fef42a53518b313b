"""Flags derived from the settings models, so that an option is declared once."""

from __future__ import annotations

import inspect
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin

import typer

from corrsteer.cli.settings import Settings, asked, read

S = TypeVar("S", bound=Settings)

Config = Annotated[Path | None, typer.Option(help="YAML file of settings, named like the options; options win.")]


@dataclass(frozen=True)
class Given(Generic[S]):
    """What the command line says of a command's settings: a YAML file, and flags, None where not given."""

    kind: type[S]
    config: Path | None
    flags: dict[str, Any]

    @staticmethod
    def settings_of(annotation: Any) -> type[Settings]:
        """The settings model in `Given[...]`."""
        return get_args(annotation)[0]

    def read(self, defaults: dict[str, Any] | None = None) -> S:
        """The settings: `defaults`, the YAML file over them, flags over both."""
        return read(self.kind, self.config, self.flags, defaults)

    def asked(self, name: str) -> Any:
        """What is given for a setting, by a flag or by the YAML file; None where it is by neither."""
        return asked(name, self.config, self.flags)

    @property
    def names(self) -> list[str]:
        """The options that were given."""
        everything = self.flags | {"config": self.config}
        return [f"--{name.replace('_', '-')}" for name, value in everything.items() if value is not None]


def flags(settings: type[Settings]) -> list[inspect.Parameter]:
    """`--config`, and an optional flag for each setting, with its description as help."""
    shown: dict[str, Any] = {"config": Config}
    for name, field in settings.model_fields.items():
        shown[name] = Annotated[_flag_type(field.annotation) | None, typer.Option(help=field.description)]
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in shown.items()
    ]


def _flag_type(annotation: Any) -> Any:
    """What Typer reads a setting as; pydantic looks at the value, so a choice is text."""
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (part for part in get_args(annotation) if part is not type(None))
    return str if get_origin(annotation) is Literal else annotation
