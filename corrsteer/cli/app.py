"""The Typer application, how a command joins it, and how commands speak."""

from __future__ import annotations

import functools
import inspect
import io
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from corrsteer.cli.options import Given, flags
from corrsteer.errors import CorrSteerError
from corrsteer.files import to_json
from corrsteer.version import __version__

app: typer.Typer = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Find the SAE features that correlate with a reward while a language model generates, and steer along them."
    "\n\nStart with `corrsteer demo`. The way through is collect, select, evaluate; "
    "`corrsteer doctor` says what runs here.",
)
_show_traceback = False

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _global(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say more on stderr.")] = False,
) -> None:
    global _show_traceback
    _show_traceback = traceback
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command, whose mistakes end in one line.

    A parameter `given: Given[SomeSettings]` stands for `--config` and a flag for each of those settings.
    """
    parameters = inspect.signature(function, eval_str=True).parameters
    settings = Given.settings_of(parameters["given"].annotation) if "given" in parameters else None
    derived = flags(settings) if settings else []

    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        try:
            if settings:
                values = {flag.name: arguments.pop(flag.name) for flag in derived}
                arguments["given"] = Given(settings, values.pop("config"), values)
            function(**arguments)
        except BrokenPipeError:  # whoever read our output has left, which Typer ends without a word
            raise
        except (CorrSteerError, OSError) as error:
            if _show_traceback:
                raise
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from None

    shown = [p for own in parameters.values() for p in (derived if own.name == "given" else [own])]
    shown = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in shown]
    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in shown}
    return app.command(name=function.__name__)(run)


def take_every_character() -> None:
    """Have stdout and stderr escape what the terminal's encoding lacks, rather than fail on it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Tell people something along the way."""
    typer.echo(text, err=True)


def emit(result: dict[str, Any], as_json: bool, text: str, notes: Iterable[str] = ()) -> None:
    """Print a command's result, as JSON or as text with its notes."""
    lines = [text, *(f"note: {note}" for note in notes)]
    typer.echo(to_json(result, indent=2) if as_json else "\n".join(lines))
