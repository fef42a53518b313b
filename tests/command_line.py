"""Commands in this process, for tests of the command line."""

from typer.testing import CliRunner

from corrsteer.cli import app


def run(*arguments, ok=True):
    """A command that ends well, or with a mistake."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert (result.exit_code == 0) == ok, result.output
    return result
