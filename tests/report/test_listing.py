"""Results in a terminal, and piped."""

import pytest
from typer.testing import CliRunner

from corrsteer.cli import app
from corrsteer.cli.app import emit
from corrsteer.report import listing
from corrsteer.report.listing import Listing, plain, rich_text

PARTS = [
    "[bold]two features[/bold] of layer 1",
    Listing(("feature", "r", "note"), [("12", "+0.500", "a note " * 12), ("7", "-0.250", "[red]short")], indent="   "),
]


def test_plain_text_has_its_columns_aligned_whatever_the_terminal():
    short = [PARTS[0], Listing(("", "r"), [("12", "+0.5"), ("7", "-")], indent="  ")]
    assert plain(short) == "[bold]two features[/bold] of layer 1\n         r\n  12  +0.5\n  7      -"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_gets_columns_that_fit_it_and_markup_as_text(width):
    lines = rich_text(PARTS, width).splitlines()
    shown = "\n".join(lines)
    assert "[bold]two features[/bold]" in shown and "[red]short" in shown and "+0.500" in shown
    assert all(len(line.replace("\x1b[1m", "").replace("\x1b[0m", "")) <= width for line in lines)


def test_only_a_terminal_that_can_gets_more_than_plain_text(monkeypatch, capsys):
    emit({}, False, PARTS)
    assert capsys.readouterr().out == plain(PARTS) + "\n"
    monkeypatch.setattr(listing.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    emit({}, False, PARTS)
    assert capsys.readouterr().out == plain(PARTS) + "\n"
    monkeypatch.setenv("TERM", "xterm")
    emit({}, False, PARTS, ["a note"])
    shown = capsys.readouterr().out
    assert "─" in shown and "note: a note" in shown and plain(PARTS) not in shown


def test_doctor_is_plain_where_it_is_piped():
    assert "\x1b" not in CliRunner().invoke(app, ["doctor"]).stdout
