"""Every operation launched for sm_90 up to, but not including, the launch: arguments are bound and specialised and the
kernels compiled as on a GPU, without one. Run by test_resources.py in a process of its own, as other tests interpret
the kernels.
"""

import functools
import itertools

import torch
import triton
from triton.backends.compiler import GPUTarget

from corrsteer import Moments, SparseEncoder
from corrsteer.kernels import launch, operations

compiled = []


class PretendedGPU:
    """What the launcher asks a driver."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def bind_and_compile(run, kernel, *args, grid, warmup, **kwargs):
    assert len(grid) <= 3 and all(n > 0 for n in grid), (kernel, grid)
    compiled.append(kernel.__name__)
    run(kernel, *args, grid=grid, warmup=True, **kwargs)


def encoder(activation, precision, d_in=64, d_sae=80, input_norm="none"):
    form = {"weight": torch.randn(d_sae, d_in), "bias": torch.randn(d_sae), "input_norm": input_norm, "k": 3}
    if activation == "jumprelu":
        form["threshold"] = torch.rand(d_sae)
    if activation == "gated":
        form |= {"magnitude_scale": torch.rand(d_sae), "magnitude_bias": torch.rand(d_sae)}
    return SparseEncoder(d_in, d_sae, activation, **form).to(precision=precision)


def tokens(lengths, dtype=torch.bfloat16, d_in=64):
    return torch.randn(sum(lengths), d_in).to(dtype), torch.tensor([0, *lengths]).cumsum(0).int()


def update(lengths, pools, labels, *form, dtype=torch.bfloat16, **more):
    x, cu = tokens(lengths, dtype, more.get("d_in", 64))
    made = encoder(*form, **more)
    states = tuple(Moments(made.d_sae, labels) for _ in pools)
    operations.encode_update(x, cu, torch.ones(len(lengths), labels), made, states, pools)


def everything():
    for lengths, pools in itertools.product(([1], [20, 30], [1] * 40, [2, 5, 1]), (("mean",), ("max",))):
        update(lengths, pools, 1, "jumprelu", "bf16")
    update([3, 9], ("mean", "max"), 1, "gated", "fp16", dtype=torch.float16)
    update([40, 9], ("mean",), 2, "relu", "bf16x2")
    update([3], ("max",), 1, "abstopk", "fp32", dtype=torch.float32)
    update([40, 9], ("mean",), 1, "topk", "fp32_ieee", input_norm="layer_norm")
    update([3, 40], ("mean",), 1, "jumprelu", "bf16", input_norm="constant_norm_rescale")
    update([3, 40], ("mean",), 1, "jumprelu", "bf16", d_in=61)  # no tensor descriptors
    x, cu = tokens([0, 4, 40])
    operations.encode_pool(x, cu, encoder("jumprelu", "bf16"), ("mean", "max"))
    operations.encode_pool(x[:0], cu[:1].repeat(3), encoder("jumprelu", "bf16"), ("mean",))
    operations.encode(x, encoder("relu", "bf16"))
    operations.encode(x[:1], encoder("topk", "bf16"))
    for n, labels in ((1, 1), (5, 7)):
        operations.update_moments(torch.randn(n, 80), torch.ones(n, labels).bool(), Moments(80, labels))
    for n, powers in ((1, (1,)), (5, (3, 0, 2)), (300, (257, 1, 0, 0, 0, 40))):
        sums = torch.zeros(80, sum(powers), dtype=torch.float64)
        operations.update_sums(torch.randn(n, 80), torch.randn(n, sum(powers)).double(), sums, powers)
    for shape in ((1, 1, 16), (3, 5, 18)):
        rows = torch.zeros(shape[0], dtype=torch.int32)
        operations.steer_add(torch.randn(shape).half(), torch.randn(1, shape[2]), rows, None)
        operations.steer_add(torch.randn(shape), torch.randn(2, shape[2]), rows, torch.ones(shape[:2]).bool())


def by_panels():
    """What goes on from products of the vendor's library."""
    config = launch.config
    blocks = {"BF": 128, "BT": 16, "SUBTILE": 8, "WIDE_SUBTILE": 8, "num_warps": 1}
    panels = {"way": "panels", "panel_features": 128, "panel_tokens": 64}
    launch.config = lambda *given: config(*given) | blocks | panels
    for lengths, pools in itertools.product(([1], [20, 80, 30], [1] * 200), (("mean",), ("max",), ("mean", "max"))):
        update(lengths, pools, 1, "jumprelu", "bf16", d_sae=300)
    update([40, 90], ("mean",), 2, "relu", "bf16x2", input_norm="constant_norm_rescale")
    launch.config = config


def flattened():
    """The ways to pool, each in one loop with its product."""
    config = launch.config
    launch.config = lambda *given: config(*given) | {"BF16_SPLITS": 0, "flatten": 1}
    for lengths, pools in (([1] * 40, ("mean",)), ([2] * 40, ("mean",)), ([20, 80], ("mean", "max"))):
        update(lengths, pools, 1, "jumprelu", "bf16")
    update([3, 40], ("mean",), 1, "jumprelu", "bf16", input_norm="layer_norm")
    launch.config = config


if __name__ == "__main__":
    triton.runtime.driver.set_active(PretendedGPU())
    launch.file_for = lambda device: "sm_90"
    launch.multiprocessors = lambda device: 132
    launch.entries.cache_clear()
    run = triton.runtime.JITFunction.run
    triton.runtime.JITFunction.run = functools.partialmethod(lambda self, *a, **k: bind_and_compile(run, self, *a, **k))
    everything()
    by_panels()
    flattened()
    print(sorted(set(compiled)))
