"""A short run of `make fuzz`: whatever is wrong with an input, it ends in success or in the package's own error."""

import random

import pytest
from fuzz import arguments, files

from corrsteer import CorrSteerError

SEED = 0


def outcomes(once, kind, n):
    """How many inputs of a kind were accepted, and how many refused."""
    accepted = refused = 0
    for number in range(n):
        try:
            once(random.Random(f"{SEED} {kind} {number}"))
            accepted += 1
        except CorrSteerError as error:
            assert "\n" not in str(error)
            refused += 1
    return accepted, refused


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return files.Files(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", files.KINDS)
def test_files_with_something_wrong_are_read_or_refused(made, kind):
    accepted, refused = outcomes(lambda rng: made.once(rng, kind), kind, 60)
    assert accepted and refused, "inputs that are always the one or the other say little"


@pytest.mark.parametrize("kind", arguments.KINDS)
def test_arguments_with_something_wrong_give_what_the_reference_gives_or_are_refused(kind):
    accepted, refused = outcomes(arguments.KINDS[kind], kind, 60)
    assert accepted and refused
