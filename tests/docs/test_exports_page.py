"""The page on exports lists the formats that there are."""

from pathlib import Path

from corrsteer.integrations.exports import FORMATS

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "exports.md"


def test_the_table_of_formats_is_what_the_formats_say_of_themselves():
    rows = [
        f"| `{form.name}` | {form.what} | {', '.join(f'`{position}`' for position in form.positions)} | {form.proven} |"
        for form in FORMATS.values()
    ]
    assert "\n|---|---|---|---|\n" + "\n".join(rows) + "\n\n" in PAGE.read_text(encoding="utf-8")
