"""The committed parity of SAE formats."""

import json

import pytest

from bench import formats, record
from corrsteer.sae.formats import FORMATS

RESULT = json.loads((record.STUDIES / "formats.json").read_text())


def test_every_format_was_compared_with_its_library_in_both_dtypes():
    seen = {(one["format"], one["sae"], one["dtype"]) for one in RESULT["errors"]}
    assert seen == {(*key, dtype) for key in formats.PUBLISHED for dtype in formats.DTYPES}
    assert [row[0] for row in formats.format_rows(RESULT)] == [one.title for one in FORMATS.values()]


@pytest.mark.parametrize("one", RESULT["errors"], ids=lambda one: f"{one['format']} {one['sae']} {one['dtype']}")
def test_ours_are_as_near_to_the_truth_as_the_librarys_own(one):
    assert one["ours"] < (1e-6 if one["dtype"] == "float32" else 1.1 * one["own"])


def test_without_the_libraries_the_script_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(formats, "installed", lambda package: None)
    with pytest.raises(SystemExit):
        formats.main([])
    assert "eai-sparsify, dictionary-learning must be installed" in capsys.readouterr().err
