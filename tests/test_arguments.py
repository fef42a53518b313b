"""Arguments: what is a number, and how each public function refuses what is of another kind."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import tiny_pipeline
import torch
from evidences import made

from corrsteer import (
    CorrSteerError,
    Decoding,
    Evidence,
    Moments,
    Run,
    SearchOptions,
    SparseEncoder,
    Steering,
    Trial,
    apply_rows,
    calibrate_scale,
    collect,
    demo,
    evaluate,
    inference,
    planning,
    select,
    stability,
)
from corrsteer.arguments import LARGEST_SEED, number, numbers, share, whole, wholes
from corrsteer.lm.hook_points import HookPoint
from corrsteer.stats.paired import mcnemar

NO_NUMBERS = (math.nan, math.inf, -math.inf, True, False, None, "1", [1], 1j, np.float32("nan"), np.bool_(True),
              torch.tensor(True), torch.tensor(math.inf), np.array([1]))  # fmt: skip


@pytest.mark.parametrize("value", (3, 3.0, np.int64(3), np.uint8(3), np.float32(3), np.array(3), torch.tensor(3)))
def test_a_whole_number_of_whatever_type_becomes_an_int(value):
    assert whole("n", value) == 3 and type(whole("n", value)) is int
    assert wholes("layers", [value]) == wholes("layers", np.array([3])) == wholes("layers", torch.tensor([3])) == [3]


@pytest.mark.parametrize("value", (0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5)))
def test_a_number_of_whatever_type_becomes_a_float(value):
    assert number("scale", value) == share("alpha", value) == 0.5
    assert type(number("scale", value)) is type(share("alpha", value)) is float


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused_by_name(value):
    with pytest.raises(CorrSteerError, match=r"^n must be a whole number of at least 0, got .{1,80}$"):
        whole("n", value, 0)
    with pytest.raises(CorrSteerError, match=r"^scale must be a finite number, got .{1,80}$"):
        number("scale", value)
    with pytest.raises(CorrSteerError, match=r"^alpha must be between 0 and 1, got .{1,80}$"):
        share("alpha", value)


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: whole("n", 2.5), "n must be a whole number, got 2.5"),
        (lambda: whole("n", 0, 1), "n must be a whole number of at least 1, got 0"),
        (lambda: whole("seed", 999, 0, 99), "seed must be a whole number from 0 to 99, got 999"),
        (lambda: number("top_p", np.float64(1.5), 0, 1), "top_p must be a finite number from 0 to 1, got 1.5"),
        (lambda: number("scale", 10**400), "scale must be a finite number, got 1000000"),
        (lambda: wholes("layers", 1), r"layers must be a sequence of whole numbers, such as \[1\], got 1"),
        (lambda: wholes("layers", None), "layers must be a sequence of whole numbers, got None"),
        (lambda: wholes("layers", []), "layers must hold at least one number, got none"),
        (lambda: wholes("layers", "12"), "layers must be a sequence of whole numbers, got '12'"),
        (lambda: wholes("layers", [0, -1], 0), r"layers must be .* whole numbers of at least 0, got \[0, -1\]"),
        (lambda: wholes("layers", np.array([1.5])), r"layers must be .* whole numbers, got array\(\[1.5\]\)"),
        (lambda: numbers("scales", (1, math.nan)), r"scales must be a sequence of finite numbers, got \(1, nan\)"),
    ),
)
def test_a_number_outside_its_bounds_is_refused_with_them(call, message):
    with pytest.raises(CorrSteerError, match=f"^{message}"):
        call()


VECTORS = {"blocks.1.hook_resid_post": torch.ones(3)}
STEERING, TASK, EVIDENCE = Steering.from_vectors(VECTORS), tiny_pipeline.task(5), made(d=3, permutations=19)[0]


def gather(**options):
    collect(None, None, tiny_pipeline.encoders(), TASK, **options)


@functools.cache
def small_run():
    world = tiny_pipeline.model(), tiny_pipeline.tokenizer(), tiny_pipeline.encoders()
    return collect(*world, tiny_pipeline.task(24), permutations=19, decoding=Decoding(3), progress=False)


def choose(**options):
    return select(small_run(), **options)


def pruned(**options):
    return choose(strategy="pruned", model=object(), tokenizer=object(), validation=TASK, **options)


# An argument by the name that its message gives, and a call that gives it; there is no model, so nothing can have run.
WHOLE = {
    **{name: lambda value, name=name: Decoding(**{name: value}) for name in ("max_new_tokens", "batch_tokens", "seed")},
    **{name: lambda value, name=name: gather(**{name: value}) for name in (
        "permutations", "bootstrap", "block_size", "shuffle_seed", "buffer_bytes", "statistics_bytes", "hook_offset")},
    "patience_layers": lambda value: gather(patience_layers=[value]),
    "top_k": lambda value: choose(top_k=value),
    "layers": lambda value: choose(layers=[value]),
    "rows": lambda value: apply_rows(None, [STEERING], [value]).__enter__(),
    "d_sae": lambda value: Moments(value),
    "n_labels": lambda value: Moments(3, value),
    "block": lambda value: Evidence(3).update(torch.ones(2, 3), torch.ones(2), value),
    "label": lambda value: inference.interval(EVIDENCE, label=value),
    "patience": lambda value: stability.stable([], value, []),
    "d_in": lambda value: SparseEncoder.identity(value),
    "k": lambda value: SparseEncoder(3, 4, "topk", torch.ones(4, 3), bias=torch.ones(4), k=value),
    "improved": lambda value: mcnemar(value, 3),
    "features of an encoder": lambda value: SparseEncoder.identity(4).decoder_rows([value]),
    "n": lambda value: TASK.take(value),
    "seed of a split": lambda value: TASK.split(seed=value),
    "seed of the demo": lambda value: demo.tasks(value),
    "features of planning": lambda value: planning.chance_correlation(100, value),
    "batch_size": lambda value: Decoding(batch_size=value),
    "candidates": lambda value: SearchOptions(candidates=value),
    "most_features": lambda value: SearchOptions(most_features=value),
    "completions": lambda value: SearchOptions(completions=value),
    "seed of a search": lambda value: SearchOptions(seed=value),
    "k (activations)": lambda value: planning.samples_exact(value, 0.1, 0.1),
}  # fmt: skip
NUMBERS = {
    "temperature": lambda value: Decoding(temperature=value),
    "top_p": lambda value: Decoding(top_p=value),
    "coefficient": lambda value: Steering.from_vectors(VECTORS, value),
    "by": lambda value: STEERING.features[0].scaled(value),
    "scale": lambda value: Steering([], torch.zeros(0, 3), scale=value),
    "scale of select": lambda value: pruned(scale=value),
    "scales": lambda value: calibrate_scale(None, None, STEERING, TASK, scales=[value]),
    "train": lambda value: TASK.split(train=value),
    "r (correlation)": lambda value: planning.interval_width(value, 50),
}
OPTIONAL = {  # None is the steering's own, or no limit
    "minutes": lambda value: SearchOptions(minutes=value),
    "scale of apply": lambda value: STEERING.apply(None, scale=value).__enter__(),
    "scale of evaluate": lambda value: evaluate(None, None, TASK, STEERING, scale=value),
    "scale of a trial": lambda value: Trial(STEERING, value),
}
SHARES = {
    "alpha": lambda value: choose(alpha=value),
    "level": lambda value: inference.interval(EVIDENCE, level=value),
    "level of delta": lambda value: inference.delta_interval(EVIDENCE, value),
    "level of fisher": lambda value: inference.fisher_interval(torch.zeros(1), 9, value),
    "alpha of a search": lambda value: SearchOptions(alpha=value),
    "confirm": lambda value: SearchOptions(confirm=value),
    "power": lambda value: planning.detectable_correlation(100, power=value),
}


def refused(call, name, value):
    with pytest.raises(CorrSteerError) as caught:
        call(value)
    message = str(caught.value)
    assert message.startswith(f"{name.split(' of ')[0]} must be "), message
    assert message.count("\n") == 0 and ", got " in message, message


@pytest.mark.parametrize("value", (math.nan, math.inf, -1.5, 2.5, True, "3", np.float32("nan")), ids=repr)
@pytest.mark.parametrize("name", WHOLE)
def test_a_count_or_a_seed_that_is_no_whole_number_is_refused_before_anything_runs(name, value):
    refused(WHOLE[name], name, value)


@pytest.mark.parametrize("value", (math.nan, -math.inf, True, "1", None, torch.tensor(math.nan)), ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_not_finite_is_refused_before_anything_runs(name, value):
    refused(NUMBERS[name], name, value)


@pytest.mark.parametrize("value", (math.nan, -math.inf, True, "1", torch.tensor(math.nan)), ids=repr)
@pytest.mark.parametrize("name", OPTIONAL)
def test_an_optional_number_that_is_not_finite_is_refused_before_anything_runs(name, value):
    refused(OPTIONAL[name], name, value)


@pytest.mark.parametrize("value", (math.nan, math.inf, 0, 1, 5, True, "0.5"), ids=repr)
@pytest.mark.parametrize("name", SHARES)
def test_a_share_outside_of_0_and_1_is_refused_before_anything_runs(name, value):
    refused(SHARES[name], name, value)


def test_numpys_and_torchs_numbers_are_taken_and_end_in_json(tmp_path):
    decoding = Decoding(max_new_tokens=np.int64(3), temperature=np.float32(0.5), seed=torch.tensor(7), top_p=1)
    assert decoding == Decoding(max_new_tokens=3, temperature=0.5, seed=7)
    numbers = {name: value for name, value in vars(decoding).items() if name != "first_token_among"}
    assert all(type(value) in (int, float) for value in numbers.values())
    steering = choose(layers=np.array([2, 1]), top_k=np.int32(2))
    assert [f.layer for f in steering.features] == [1, 2] and [len(rows) for rows in steering.table.values()] == [2, 2]
    own = Steering.from_vectors(VECTORS, np.float32(2))
    for made_steering in (steering, own):
        made_steering.save(tmp_path / "s")
        assert Steering.load(tmp_path / "s").features == made_steering.features
    planned = planning.samples_to_see(np.int64(10), np.float32(0.25), np.float64(0.05))
    assert planned == planning.samples_to_see(10, 0.25, 0.05) and {type(n) for n in vars(planned).values()} == {int}
    assert TASK.take(np.int64(2)) == TASK.take(2) and TASK.split(seed=np.int64(1)) == TASK.split(seed=1)


def test_a_seed_may_be_as_large_as_every_generator_takes():
    assert Decoding(seed=LARGEST_SEED).seed == 4294967295
    with pytest.raises(CorrSteerError, match="seed must be a whole number from 0 to 4294967295, got 4294967296"):
        Decoding(seed=LARGEST_SEED + 1)


def test_a_single_layer_that_is_not_in_a_list_is_told_to_be():
    with pytest.raises(CorrSteerError, match=r"^layers must be a sequence of whole numbers, such as \[1\], got 1$"):
        choose(layers=1)
    with pytest.raises(CorrSteerError, match="layers must hold at least one number, got none"):
        choose(layers=())


ENCODERS = tiny_pipeline.encoders()
OTHER_TYPES = {
    "a list of encoders": (lambda: collect(None, None, [ENCODERS[1]], TASK), "encoders must be a mapping of layers"),
    "an encoder that is none": (lambda: collect(MODEL, TOKENS, {1: "dir"}, TASK), r"encoders\[1\] must be a Sparse"),
    "no model": (lambda: collect(None, TOKENS, ENCODERS, TASK), "model must be a Hugging Face causal language model"),
    "a model without a head": (lambda: collect(MODEL.model, TOKENS, ENCODERS, TASK), "with generate, got LlamaModel"),
    "no tokenizer": (lambda: collect(MODEL, None, ENCODERS, TASK), "tokenizer must be a Hugging Face tokenizer"),
    "no task": (lambda: collect(MODEL, TOKENS, ENCODERS, None), "task must be a Task, got None"),
    "a decoding that is none": (lambda: collect(MODEL, TOKENS, ENCODERS, TASK, decoding=4), "decoding must be a Decod"),
    "no run": (lambda: select(None), "run must be a Run, as collect returns, got None"),
    "a list of steerings": (lambda: evaluate(MODEL, TOKENS, TASK, [STEERING]), "steering must be a Steering, got list"),
    "no steering": (lambda: calibrate_scale(MODEL, TOKENS, None, TASK), "steering must be a Steering, got None"),
    "no vectors": (lambda: Steering.from_vectors(None), "vectors must be a mapping of hook points to tensors"),
    "a vector that is a list": (lambda: Steering.from_vectors({"a": [1.0]}), r"vectors\['a'\] must be a tensor"),
    "a hook point that is a number": (lambda: Steering.from_vectors({2: torch.ones(3)}), "each key of vectors must be"),
    "a vector of NaN": (lambda: Steering.from_vectors({"a": torch.full((3,), torch.nan)}), "must hold finite numbers"),
    "a vector of nothing": (lambda: Steering.from_vectors({"a": torch.ones(0)}), "must hold finite numbers, one or mo"),
    "a scale beyond float32": (lambda: steered(1e39), "scale must leave what is added finite in float32, got 1e.39"),
    "a name that is a number": (lambda: HookPoint.parse(3), "hook point must be its name, got 3"),
    "a path that is a number": (lambda: Steering.load(3), "path must be a path, got 3"),
    "a run's path that is none": (lambda: Run.load(None), "directory must be a path, got None"),
    "a decoder that is a tensor": (lambda: with_decoder(torch.ones(48, 128)), "decoder must be a Decoder, got Tensor"),
}
MODEL, TOKENS = tiny_pipeline.model(), tiny_pipeline.tokenizer()


def steered(scale):
    vectors = {"blocks.1.hook_resid_post": torch.ones(128)}
    with Steering.from_vectors(vectors).apply(MODEL, scale=scale):
        raise AssertionError("it was entered")


def with_decoder(decoder):
    dataclasses.replace(ENCODERS[1], decoder=decoder)


@pytest.mark.parametrize("call", OTHER_TYPES)
def test_what_is_of_another_type_is_refused_by_its_name(call):
    wrong, message = OTHER_TYPES[call]
    with pytest.raises(CorrSteerError, match=message):
        wrong()


def test_a_tokenizer_of_another_model_is_refused():
    model = tiny_pipeline.model()
    model.resize_token_embeddings(8)
    with pytest.raises(CorrSteerError, match="the tokenizer gives token .*, but the model knows 8"):
        collect(model, TOKENS, ENCODERS, TASK, progress=False)
