"""What a steered decode step costs, and that it adds the same bits as the operation."""

import contextlib
import functools
import inspect
from collections import Counter

import calls
import pytest
import torch
from tiny_models import LAYERS, WIDTH, batch_of, build, prompts_of, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from corrsteer import Steering, apply_rows, ops
from corrsteer.errors import CorrSteerError
from corrsteer.lm import passes
from corrsteer.lm.hook_points import HookPoint

LENGTHS = (2, 7, 5, 4)
ROWS = (1, -1, 0, 1)


def steerings(model):
    """Two steerings of every layer."""
    generator, layers = torch.Generator().manual_seed(0), range(model.config.num_hidden_layers)
    return [
        Steering.from_vectors({str(HookPoint(layer)): torch.randn(WIDTH, generator=generator) for layer in layers})
        for _ in range(2)
    ]


STEERED = {
    "one vector": (lambda model, **options: steerings(model)[0].apply(model, **options), (0,) * len(ROWS)),
    "rows that differ": (lambda model, **options: apply_rows(model, steerings(model), ROWS, **options), ROWS),
}
steered = pytest.mark.parametrize(("context", "rows"), STEERED.values(), ids=STEERED)


def decoding(model):
    """A function that runs the next decode step each time, after prompts that were read as the model is now."""
    batch = batch_of(prompts_of(LENGTHS))
    name = next(name for name in passes.CACHES if name in inspect.signature(model.forward).parameters)
    cache, token = {name: model(**batch, use_cache=True).past_key_values}, batch["input_ids"][:, -1:]
    mask = batch["attention_mask"]

    def step():
        nonlocal mask
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        return model(token, attention_mask=mask, **cache).logits

    return step


class Operations(TorchDispatchMode):
    """Counts what torch runs."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **kwargs or {})


def operations_of_a_decode_step(context):
    step = decoding(tiny("llama"))
    with context(tiny("llama")):
        step()  # the first one gathers what is added
        with Operations() as operations:
            step()
    return operations.counts


@functools.cache
def unsteered():
    return operations_of_a_decode_step(lambda model: contextlib.nullcontext())


@steered
@pytest.mark.parametrize("positions", ["generated", "all"])
def test_a_decode_step_takes_one_addition_a_layer_and_no_backend(context, rows, positions, monkeypatch):
    monkeypatch.setattr(ops, "steer_add", lambda *_: pytest.fail("a backend was called"))
    found = operations_of_a_decode_step(functools.partial(context, positions=positions))
    assert found - unsteered() == {"aten.add_.Tensor": LAYERS} and not unsteered() - found


@steered
def test_a_decode_step_takes_nothing_where_prompts_alone_are_steered(context, rows):
    assert operations_of_a_decode_step(functools.partial(context, positions="prompt")) == unsteered()


@steered
def test_what_a_pass_has_decided_is_looked_up_in_each_layer(context, rows):
    def called(layers):
        """Functions of ours that a decode step calls."""
        model = build("llama", num_hidden_layers=layers)
        step = decoding(model)
        with context(model):
            step()
            with calls.counted() as found:
                step()
        return found

    more = called(2 * LAYERS) - called(LAYERS)
    assert more == dict.fromkeys(("after", "at", "__call__"), LAYERS)  # a hook, what it is for, and the addition



@steered
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_decode_step_adds_to_the_bit_what_the_operation_adds(context, rows, dtype):
    model, seen = build("llama", dtype), []
    layer = model.model.layers[1]

    def before(_module, _args, h):
        h[..., ::3] = -0.0  # which adding 0 would make 0
        seen.append(h.clone())

    step, handles = decoding(model), [layer.register_forward_hook(before)]
    with context(model):
        handles.append(layer.register_forward_hook(lambda _module, _args, h: seen.append(h.clone())))
        step()
    for handle in handles:
        handle.remove()
    plain, found = seen
    vectors = torch.stack([steering.vectors()[HookPoint(1)] for steering in steerings(model)])
    expected = ops.steer_add(plain.clone(), vectors, torch.tensor(rows, dtype=torch.int32), backend="reference")
    assert found.dtype == dtype and not torch.equal(found, plain)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("size", [1, 2])
def test_a_batch_of_another_size_than_rows_is_refused_in_a_decode_step_too(size):
    model = tiny("llama")
    step = decoding(model)
    with apply_rows(model, steerings(model), [0] * size):
        with pytest.raises(CorrSteerError, match=rf"one entry per row of the batch \({len(ROWS)}\), got {size}"):
            step()


@steered
@pytest.mark.parametrize("entered", [contextlib.nullcontext, torch.inference_mode], ids=["as usual", "in inference"])
def test_gradients_of_a_steered_decode_step_are_those_of_plain_hooks(context, rows, entered):
    def gradient(hooked):
        model = build("llama")
        weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
        with torch.no_grad():
            step = decoding(model)
        with hooked(model):
            with entered():
                step()  # which gathers what is added
            step().square().sum().backward()
        return weight.grad

    @contextlib.contextmanager
    def plain(model):
        handles = []
        for at, layer in enumerate(model.model.layers):
            vectors = [steering.directions[at] for steering in steerings(model)] + [torch.zeros(WIDTH)]
            added = torch.stack([vectors[row] for row in rows])[:, None]
            handles.append(layer.register_forward_hook(lambda _module, _args, h, added=added: h + added))
        yield
        for handle in handles:
            handle.remove()

    found = gradient(context)
    assert torch.equal(found, gradient(plain)) and bool(found.any())
    assert not torch.equal(found, gradient(lambda model: contextlib.nullcontext()))
