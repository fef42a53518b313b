"""The Typer application, how a command joins it, and how commands speak."""

from __future__ import annotations

import functools
import inspect
import io
import logging
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corrsteer import processes
from corrsteer.cli.options import Given, flags
from corrsteer.errors import CorrSteerError
from corrsteer.files import to_json
from corrsteer.rollouts.spending import spent
from corrsteer.version import __version__

if TYPE_CHECKING:
    from corrsteer.report.listing import Part

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

Force = Annotated[bool, typer.Option("--force", help="Begin anew, and replace a result that is there.")]


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
        except (Exception, KeyboardInterrupt) as error:
            kept = getattr(error, "unfinished", None)
            if not (kept or isinstance(error, CorrSteerError | OSError | KeyboardInterrupt)):
                raise
            if _show_traceback:
                traceback.print_exception(error)
            typer.echo(f"error: {_in_one_line(error, kept)}", err=True)
            raise typer.Exit(_status(error)) from None
        finally:
            _say_what_was_spent()

    shown = [p for own in parameters.values() for p in (derived if own.name == "given" else [own])]
    shown = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in shown]
    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in shown}
    return app.command(name=function.__name__.rstrip("_"))(run)  # import_, as Python has the word


def _say_what_was_spent() -> None:
    """Tokens and cost of judges, also where a command fails."""
    for line in spent():
        say(line)


class Terminated(KeyboardInterrupt):
    """The system asks to end, as schedulers do before they kill."""

    def __init__(self) -> None:
        super().__init__("terminated")


def end_when_asked() -> None:
    """Have a request to end (SIGTERM) end a command as an interrupt from the keyboard does."""

    def end(*_: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, end)


def _in_one_line(error: BaseException, kept: Path | None) -> str:
    """What went wrong, and how to go on with what was done, where that is kept."""
    known = isinstance(error, CorrSteerError | OSError)
    what = str(error) if known else f"{type(error).__name__}: {error}"
    if isinstance(error, KeyboardInterrupt):
        what = str(error) or "interrupted"
    if kept is not None:
        given = [argument for argument in sys.argv[1:] if argument != "--force"]  # which would throw it away
        again = "the same command" if processes.among_others() else shlex.join([_program(), *given])
        what = f"{what}; what was done is kept in {kept}. Go on with: {again}"
    return " ".join(what.split())


def _program() -> str:
    name = Path(sys.argv[0]).name
    return "python -m corrsteer" if name == "__main__.py" else name


def _status(error: BaseException) -> int:
    """The exit status: what shells give where a signal ends a program."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__
    if cause is None:
        return 1
    return 128 + (signal.SIGTERM if isinstance(cause, Terminated) else signal.SIGINT)


def take_every_character() -> None:
    """Have stdout and stderr escape what the terminal's encoding lacks, rather than fail on it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Tell people something along the way."""
    if processes.rank() == 0:  # the first of several speaks for all
        typer.echo(text, err=True)


def emit(result: dict[str, Any], as_json: bool, text: str | list[Part], notes: Iterable[str] = ()) -> None:
    """Print a command's result, as JSON or as text with its notes; for a terminal, parts are set in its width."""
    from corrsteer.report.listing import plain, print_rich, rich_terminal

    if processes.rank() != 0:
        return
    parts = [*([text] if isinstance(text, str) else text), *(f"note: {note}" for note in notes)]
    if as_json:
        typer.echo(to_json(result, indent=2))
    elif not isinstance(text, str) and rich_terminal():
        print_rich(parts, sys.stdout)
    else:
        typer.echo(plain(parts))
