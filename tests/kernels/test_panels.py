"""Products of the vendor's library, a panel at a time: when they are used, and what is given to whom.

That they lead to the right results is tested with every backend, in `test_operations.py`, at the places PANELS.
"""

import contextlib

import pytest
import torch
import triton
import triton.language as tl
from places import PANELS, TRITON, at, everywhere
from problems import BF16, F16, F32, Case, make, pooled, updated

from corrsteer.kernels.panels import load_tile

INTERPRETED = PANELS[0]
WHEN = {  # d_sae 131 and 130 tokens, in panels of 64 by 64
    "16-bit operands": (Case("jumprelu", "bf16", BF16, (130,), d_sae=131), 9),
    "float16": (Case("gated", "fp16", F16, (100, 30), d_sae=131), 9),
    "weights of two bfloat16": (Case("relu", "bf16x2", BF16, (130,), d_sae=131), 9),
    "few features and tokens": (Case("relu", "bf16", BF16, (1, 2), d_sae=3), 1),
    "rescaled tokens": (Case("relu", "bf16", BF16, (130,), d_sae=131, norm="constant_norm_rescale"), 9),
    "no tokens": (Case("relu", "bf16", BF16, (0, 0)), 0),
    "layer norm, for which tokens are shifted": (Case("relu", "bf16", BF16, (130,), norm="layer_norm"), 0),
    "float32": (Case("relu", lengths=(130,)), 0),
    "operands of two dtypes": (Case("relu", "bf16", F16, (130,)), 0),
    "top k": (Case("topk", "bf16", BF16, (130,)), 0),
}


@pytest.fixture
def products(monkeypatch):
    """What is multiplied by the library, as it comes: shapes of tokens and weights."""
    from corrsteer.kernels import panels

    multiply, shapes = panels.multiply, []

    def watched(x, weight, weight_low, out):
        shapes.append((len(x), len(weight)))
        multiply(x, weight, weight_low, out)

    monkeypatch.setattr(panels, "multiply", watched)
    return shapes


@pytest.mark.parametrize(("place", "case", "number"), [at(INTERPRETED, *when, id=name) for name, when in WHEN.items()])
def test_panels_cover_all_features_and_tokens_once_where_operands_are_16_bit_and_unshifted(
    place, case, number, products
):
    problem = make(case, place.device)
    pooled(problem, place)
    assert len(products) == number
    if number:
        assert sum(tokens * features for tokens, features in products) == len(problem.x) * case.d_sae
    del products[:]
    updated(problem, torch.ones(len(case.lengths)), place)
    assert len(products) == number


@everywhere((TRITON[0],))
def test_what_ships_multiplies_in_the_kernel(place, products):
    pooled(make(Case("relu", "bf16", BF16, (130,)), place.device), place)
    assert products == []


@everywhere((INTERPRETED,))
@pytest.mark.parametrize(("rows", "number"), [(64, 0), (200, 3)], ids=["in groups", "all at once"])
def test_samples_pooled_in_groups_do_not_multiply_all_tokens_for_each(place, rows, number, products, monkeypatch):
    from corrsteer.kernels import encode_update as module

    monkeypatch.setattr(module, "ROWS_BYTES", rows * 4 * 37)
    problem = make(Case("relu", "bf16", BF16, (1,) * 150, "mean"), place.device)
    (got,) = updated(problem, torch.ones(150, 3), place)
    assert len(products) == number and got.n == 150


class Stream:
    """A stream that writes down what it is told."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.mark.parametrize("fails", (False, True), ids=("all goes well", "a launch fails"))
def test_the_second_stream_begins_after_the_callers_work_and_the_caller_waits_for_it(monkeypatch, fails):
    from corrsteer.kernels import panels

    log = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("caller", log))
    monkeypatch.setattr(panels, "side_stream", lambda device: Stream("side", log))
    with contextlib.suppress(RuntimeError), panels.fork(torch.device("cuda", 0)) as streams:
        log.append([s.name for s in streams])
        if fails:
            raise RuntimeError("out of resources")
    assert log == ["side waits for caller", ["caller", "side"], "caller waits for side"]


@triton.jit
def copy_tile_kernel(product, stride, out, f0, t0, tokens, BF: tl.constexpr, BT: tl.constexpr):
    acc = load_tile(product, stride, f0, t0, tokens, BF, BT)
    tl.store(out + tl.arange(0, BF)[:, None] * BT + tl.arange(0, BT)[None, :], acc)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted here")
def test_a_panel_may_have_more_than_2_to_the_31_elements():
    stride, tokens = 1 << 20, 2064
    product = torch.empty(tokens, stride, dtype=F32)  # of which little is ever touched
    tile = torch.randn(16, 64)
    product[2048:, -64:] = tile
    out = torch.empty(64, 16)
    copy_tile_kernel[(1,)](product, stride, out, stride - 64, 2048, 13, BF=64, BT=16)
    assert torch.equal(out[:, :13].T, tile[:13]) and not out[:, 13:].any()
