"""What the operations cost on this machine, one contestant after the other.

    python -m pytest bench --benchmark-only --benchmark-json=NAME.json

Small enough to run anywhere; a group is a case. On a busy machine the times drift while they are taken: figures that
are to be compared come from `python -m bench.cpu`, which takes the same ones interleaved.
"""

import functools

import pytest

from bench import cpu, shapes
from bench.contestants import contestants


@functools.lru_cache(maxsize=1)  # contestants of a case are timed one after the other, and share its inputs
def of(case):
    return contestants(case, cpu.DEVICE, cpu.backends_of(case))


PAIRS = [pytest.param(case, name, id=f"{case.name}-{name}") for case in shapes.cpu_cases() for name in of(case)]


@pytest.mark.parametrize("case, name", PAIRS)
def test_operation(benchmark, case, name):
    contestant = of(case)[name]()
    assert contestant.check is None or contestant.check()["ok"]
    benchmark.group = case.name
    benchmark(contestant.call, 0)
