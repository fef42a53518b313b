"""Arguments of the operations and of what they are given: of any type, shape, dtype and number."""

import math

import torch

from corrsteer import CorrSteerError, Moments, SparseEncoder, encode, encode_pool, encode_update
from corrsteer.ops import steer_add, update_moments, update_sums
from corrsteer.ops.rows import SparseRows
from corrsteer.stats.evidence import Evidence

STRANGE = (None, True, -1, 0, 2**62, 1.5, math.nan, "x", "mean", [], [1, 2], (), {}, object, torch.float32)
DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64,
          torch.int32, torch.bool, torch.uint8, torch.complex64)  # fmt: skip
ACTIVATIONS = ("relu", "jumprelu", "gated", "topk", "abstopk", "identity")
CHOOSES = ("topk", "abstopk")  # between equals, as it likes
SIZES = (0, 1, 2, 3, 5, 8, 17)


def size(rng):
    return rng.choice(SIZES)


def tensor(rng, *shape, dtypes=DTYPES, wild=0.1):
    """A tensor of about this shape."""
    shape = list(shape)
    if rng.random() < wild and shape:
        how = rng.randrange(3)
        if how == 0:
            shape.append(size(rng))
        elif how == 1:
            shape.pop()
        else:
            shape[rng.randrange(len(shape))] = size(rng)
    dtype = rng.choice(dtypes) if rng.random() < wild else dtypes[0]
    values = torch.randn(shape, generator=_generator(rng), dtype=torch.float32, device="cpu")
    if values.numel() and rng.random() < wild:
        values.view(-1)[rng.randrange(values.numel())] = rng.choice((math.nan, math.inf, -math.inf, 1e30, -0.0))
    found = values.to(dtype)
    if rng.random() < wild and found.dim() > 1:
        found = found.transpose(0, 1).contiguous().transpose(0, 1)
    if rng.random() < wild / 6:
        return found.to("meta")
    if rng.random() < wild / 3 and found.dim() and dtype.is_floating_point:
        return found.to_sparse()
    return found


def _generator(rng):
    return torch.Generator("cpu").manual_seed(rng.randrange(2**31))


def strange(rng, value, wild=0.06):
    return rng.choice(STRANGE) if rng.random() < wild else value


def offsets(rng, n, total):
    """`cu_seqlens`, that lie now and then."""
    cuts = sorted(rng.randint(0, total) for _ in range(max(0, n - 1)))
    values = [0, *cuts, total]
    if rng.random() < 0.15:
        values[rng.randrange(len(values))] = rng.choice((-1, 2**31 - 1, total + 1, 0))
    dtype = rng.choice((torch.int64, torch.float32, torch.float64)) if rng.random() < 0.1 else torch.int32
    found = torch.tensor(values, dtype=dtype, device="cpu")
    return found[::2] if rng.random() < 0.05 else found


def encoder(rng, d_in, d_sae):
    """An encoder, of parts that may not fit."""
    activation = rng.choice(ACTIVATIONS)
    if activation == "identity" and rng.random() < 0.9:
        return SparseEncoder.identity(d_in)
    parts = {"weight": tensor(rng, d_sae, d_in, wild=0.05), "bias": tensor(rng, d_sae, wild=0.05)}
    if activation == "jumprelu":
        parts["threshold"] = tensor(rng, d_sae, wild=0.05)
    if activation == "gated":
        parts |= {"magnitude_scale": tensor(rng, d_sae, wild=0.05), "magnitude_bias": tensor(rng, d_sae, wild=0.05)}
    parts = {name: strange(rng, part, 0.01) for name, part in parts.items()}
    norm = rng.choice(("none", "none", "layer_norm", "constant_norm_rescale"))
    k = strange(rng, rng.randint(1, max(1, d_sae)), 0.03)
    made = SparseEncoder(d_in, d_sae, strange(rng, activation, 0.01), **parts, k=k, input_norm=norm)
    return made.to(precision=rng.choice(("fp32", "bf16", "bf16x2", "fp16"))) if rng.random() < 0.2 else made


def close(found, expected):
    """Whether finite results agree; what is not finite must be so in both."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    found, expected = found.double(), expected.double()
    there = expected.isfinite()
    if bool(there.any()):
        scale = float(expected[there].abs().max()) + 1
        assert bool(((found - expected).abs()[there] <= 2e-2 * scale).all())


def both(operation, finite=True):
    """An operation by the backend that is chosen and by the reference: both refuse, or agree."""
    try:
        expected = operation("reference")
    except CorrSteerError:
        operation(None)  # which must refuse as well, and say so
        raise AssertionError("the chosen backend takes what the reference refuses") from None
    found = operation(None)
    if finite:
        for one, other in zip(found, expected):
            close(one, other)


def _tuple(found):
    return found if isinstance(found, tuple) else (found,)


def finite(*tensors):
    """Whether all numbers have squares that float32 can hold: of others, norms are what rounding makes of them."""
    dense = [t for t in tensors if isinstance(t, torch.Tensor) and not t.is_meta and not t.is_sparse]
    return all(bool((t.double().abs() < 1e15).all()) for t in dense if not t.is_complex())


def _of_encoder(made):
    return [getattr(made, name) for name in ("weight", "bias", "threshold", "magnitude_scale", "magnitude_bias")]


def encoding(rng):
    d_in, d_sae, total, n = size(rng), size(rng), size(rng), rng.choice(SIZES[1:])
    made = strange(rng, encoder(rng, d_in, d_sae), 0.02)
    x = strange(rng, tensor(rng, total, d_in), 0.02)
    fine = isinstance(made, SparseEncoder) and finite(x, *_of_encoder(made)) and made.activation not in CHOOSES
    if rng.random() < 0.4:
        both(lambda backend: (encode(x, made, backend=backend),), fine)
    else:
        cu, pool = strange(rng, offsets(rng, n, total), 0.02), strange(rng, rng.choice(("mean", "max", "both")))
        both(lambda backend: _tuple(encode_pool(x, cu, made, pool, backend=backend)), fine)


def updating(rng):
    d_in, d_sae, total, n = size(rng), size(rng), size(rng), rng.choice(SIZES[1:])
    made, x, cu = encoder(rng, d_in, d_sae), tensor(rng, total, d_in), offsets(rng, n, total)
    labels = rng.choice((1, 1, 2))
    y = strange(rng, tensor(rng, n, labels, wild=0.1) if labels > 1 else tensor(rng, n, wild=0.1), 0.02)
    d_state = strange(rng, d_sae, 0.03)

    def operation(backend):
        state = Moments(d_state, labels)
        encode_update(x, cu, y, made, state, "mean", backend=backend)
        return tuple(state.state())

    both(operation, finite(x, y, *_of_encoder(made)) and made.activation not in CHOOSES)


def folding(rng):
    d_sae, n, labels = size(rng), size(rng), rng.choice((1, 2))
    pooled, y = strange(rng, tensor(rng, n, d_sae), 0.02), strange(rng, tensor(rng, n, labels), 0.02)
    d_state = strange(rng, d_sae, 0.03)

    def operation(backend):
        state = Moments(d_state, labels)
        update_moments(pooled, y, state, backend=backend)
        return tuple(state.state())

    both(operation, finite(pooled, y))


def summing(rng):
    d_sae, n, c = size(rng), size(rng), size(rng)
    float64 = (torch.float64, *DTYPES)
    pooled, weights = tensor(rng, n, d_sae), strange(rng, tensor(rng, n, c, dtypes=float64), 0.02)
    first = rng.randint(0, c)
    powers = strange(rng, rng.choice((None, [c], [first, c - first], [rng.randint(-1, 5) for _ in range(3)])), 0.05)
    start = tensor(rng, d_sae, c, dtypes=float64)

    def operation(backend):
        sums = start.clone()
        update_sums(pooled, weights, sums, powers, backend=backend)
        return (sums,)

    both(operation, finite(pooled, weights, start))


def adding(rng):
    b, s, d, v = size(rng), size(rng), size(rng), size(rng)
    start, vectors = tensor(rng, b, s, d), strange(rng, tensor(rng, v, d), 0.02)
    rows = torch.tensor([rng.randint(-1, max(-1, v - 1)) for _ in range(b)], dtype=torch.int32, device="cpu")
    if b and rng.random() < 0.1:
        rows[0] = rng.choice((-2, v, 2**31 - 1))
    rows = strange(rng, rows, 0.02)
    chosen = tensor(rng, b, s)
    positions = rng.choice((None, chosen if chosen.is_sparse or chosen.is_complex() else chosen > 0))

    def operation(backend):
        h = start.clone()
        steer_add(h, vectors, rows, positions, backend=backend)
        return (h,)

    both(operation, finite(start, vectors))


def rows(rng):
    d_sae, n = size(rng), size(rng)
    dense = tensor(rng, n, d_sae)
    made = SparseRows.from_dense(dense)
    there = dense.float()
    close(made.dense(), there + 0.0) if finite(dense) else made.dense()
    parts = {name: strange(rng, part, 0.1) for name, part in made.tensors().items()}
    again = SparseRows.from_tensors(parts, strange(rng, d_sae, 0.1))
    again.dense(rows=strange(rng, slice(None), 0.1), features=strange(rng, slice(None), 0.1))


def states(rng):
    """Moments and evidence of any sizes, which are updated and merged."""
    d_sae, n = rng.choice(SIZES[1:]), size(rng)
    permutations, bootstrap = rng.choice((0, 19)), rng.choice((0, 3))
    evidence = Evidence(
        strange(rng, d_sae, 0.02), permutations=strange(rng, permutations, 0.02),
        bootstrap=strange(rng, bootstrap, 0.02), seed=strange(rng, 0, 0.02), within=strange(rng, False, 0.02),
    )  # fmt: skip
    pooled, y = tensor(rng, n, d_sae), tensor(rng, n)
    groups = rng.choice((None, None, list(range(n)), [rng.randrange(max(1, n)) for _ in range(n)]))
    evidence.update(pooled, y, strange(rng, 0, 0.02), groups=strange(rng, groups, 0.02))
    other = Evidence(rng.choice((d_sae, d_sae, 4)), permutations=permutations, bootstrap=bootstrap)
    other.update(tensor(rng, 3, other.d_sae, wild=0.0), tensor(rng, 3, wild=0.0), rng.choice((1, 1, 0)), groups=None)
    evidence.merge(strange(rng, other, 0.02))
    moments = Moments(strange(rng, d_sae, 0.02), strange(rng, 1, 0.02))
    moments.merge(strange(rng, Moments(rng.choice((d_sae, 4))), 0.05))


KINDS = {name: globals()[name] for name in ("encoding", "updating", "folding", "summing", "adding", "rows", "states")}
