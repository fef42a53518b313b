"""The command line, a file a command.

Results go to stdout, as text or with `--json` as one JSON object; everything said along the way goes to stderr.
A user's mistake ends with one line and exit status 1; `--traceback` shows where it was noticed.
"""

# each registers its command, in the order of the help
from corrsteer.cli import demo, rollouts, collect, regrade, show, select, calibrate, evaluate, generate  # noqa: F401, I001
from corrsteer.cli import export, import_, report, figure, run, plan, doctor  # noqa: F401, I001
from corrsteer.cli.app import app, end_when_asked, take_every_character

__all__ = ["app", "main"]


def main() -> None:
    """Entry point."""
    take_every_character()
    end_when_asked()
    app()
