"""What encode_update costs on this machine, against SAELens' encode followed by pooling and moments in torch.

    python -m pytest bench --benchmark-only --benchmark-json=bench/results/NAME.json

Small enough to run anywhere; the group is the shape, and the comparison that matters is within a group.
"""

import pytest
import torch

from corrsteer import Moments, SparseEncoder, backends, encode_update

SHAPES = {"d_in 512, d_sae 4096, 512 tokens": (512, 4096, 512)}
KEPT_STEPS = (1, 8, 64)


def world(shape, steps):
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    d_in, d_sae, tokens = SHAPES[shape]
    torch.manual_seed(0)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae))
    with torch.no_grad():
        sae.threshold.fill_(1.0)
    x = torch.randn(tokens, d_in)
    cu_seqlens = torch.arange(0, tokens + 1, steps, dtype=torch.int32)
    y = (torch.rand(len(cu_seqlens) - 1) < 0.5).float()
    return sae, x, cu_seqlens, y


def shapes_and_steps(function):
    return pytest.mark.parametrize("steps", KEPT_STEPS)(pytest.mark.parametrize("shape", SHAPES)(function))


@shapes_and_steps
@pytest.mark.parametrize("backend", [b.name for b in backends.registered()])
def test_encode_update(benchmark, shape, steps, backend):
    sae, x, cu_seqlens, y = world(shape, steps)
    encoder = SparseEncoder.from_sae_lens(sae)
    moments = Moments(encoder.d_sae)
    benchmark.group = f"{shape}, {steps} kept steps a sample"
    benchmark(encode_update, x, cu_seqlens, y, encoder, moments, "mean", backend=backend)
    assert moments.n % len(y) == 0 and moments.n > 0


@shapes_and_steps
def test_sae_lens_encode_then_torch(benchmark, shape, steps):
    """What a user writes today: SAELens' dense activations, a mean per sample, raw float64 sums on the CPU."""
    sae, x, cu_seqlens, y = world(shape, steps)
    sums = torch.zeros(3, sae.cfg.d_sae, dtype=torch.float64)

    @torch.no_grad()
    def collect():
        pooled = sae.encode(x).view(-1, steps, sae.cfg.d_sae).mean(1).double()
        sums[0] += pooled.sum(0)
        sums[1] += pooled.square().sum(0)
        sums[2] += y.double() @ pooled

    benchmark.group = f"{shape}, {steps} kept steps a sample"
    benchmark(collect)
    assert sums[0].sum() > 0
