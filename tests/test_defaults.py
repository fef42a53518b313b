"""PyTorch's default dtype and device: results are the same under any, as no tensor of ours is made by default."""

import ast
import contextlib
import sys
from pathlib import Path

import pytest
import tiny_pipeline
import torch
from places import NATIVE, REFERENCE, TRITON, everywhere
from problems import F32, Case, make, pooled
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from corrsteer import (
    Evidence,
    Moments,
    Run,
    SparseEncoder,
    Steering,
    calibrate_scale,
    collect,
    encode,
    encode_update,
    evaluate,
    inference,
    planning,
    scores,
    select,
    stability,
    steer_add,
    update_moments,
    update_sums,
)
from corrsteer.lm.decoding import Decoding
from corrsteer.ops import RunningPool
from corrsteer.ops.rows import SparseRows
from corrsteer.stats import stored
from corrsteer.stats.evidence import SCORES, STREAMED

ROOT = Path(__file__).parents[1]
OURS = [ROOT / "corrsteer", ROOT / "kernels", ROOT / "bench"]
ROOMS = [
    *sorted(path.parent for path in (ROOT / "corrsteer").glob("*/__init__.py") if path.parts[-2] != "kernels"),
    *OURS[1:],
]
FACTORIES = {function for function in _device_constructors() if getattr(torch, function.__name__, None) is function}
DECODING = Decoding(max_new_tokens=4, batch_size=16)


class Explicit(TorchFunctionMode):
    """Refuses tensors that our files make without a dtype or a device; other packages may, and do."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in FACTORIES:
            caller = sys._getframe(1)
            path = Path(caller.f_code.co_filename).resolve()
            if any(folder in path.parents for folder in OURS):
                missing = {"dtype", "device"} - set(kwargs)
                assert not missing, f"{path}:{caller.f_lineno} calls {function.__name__} without {sorted(missing)}"
        return function(*args, **kwargs)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "none at all": Explicit,
    "meta": lambda: torch.device("meta"),  # a device without numbers; transformers itself needs another
}


def whole_way(model, folder):
    """What a user does, from SAEs on disk to an evaluation, and everything that comes out on the way."""
    encoders = {layer: SparseEncoder.load(ROOT / "corrsteer" / "demo" / "sae" / f"layer_{layer}") for layer in (1, 2)}
    task, tokenizer = tiny_pipeline.task(48), tiny_pipeline.tokenizer()
    run = collect(
        model, tokenizer, encoders, task, pool="max", coefficient_pool="mean", decoding=DECODING, permutations=19,
        bootstrap=30, scores=STREAMED, block_size=24, buffer_bytes=1 << 18, progress=False,
    )  # fmt: skip
    run.save(folder / "run")
    found = said_of(folder)
    steering = Steering.load(folder / "steering.safetensors")
    found |= {f"vector at {point}": vector for point, vector in steering.vectors(model).items()}
    evaluation = evaluate(model, tokenizer, task, steering, decoding=DECODING).to_dict()
    found["evaluation"] = repr({k: v for k, v in evaluation.items() if not k.endswith("tokens_per_second")})
    scaled = calibrate_scale(model, tokenizer, steering, task, decoding=DECODING, progress=False)
    found["scaled"] = repr((scaled.features, scaled.provenance["calibration"]))
    return found


def said_of(folder):
    """What a run says, and what is selected from it; without a language model."""
    run = Run.load(folder / "run")
    found = {"rewards": run.rewards}
    for layer, evidence in ((layer, of["max"]) for layer, of in run.evidence.items()):
        found |= {f"{layer} {name}": getattr(evidence, name) for name in Evidence.STATE}
        found |= {f"{layer} {name}": scores.score(evidence, name) for name in STREAMED}
        found |= {f"{layer} {name}": torch.stack(inference.interval(evidence, name)) for name in inference.METHODS}
        found[f"{layer} error"] = inference.coefficient_error(evidence, run.moments[layer]["mean"], "contrastive")
    for name in STREAMED:
        for layer, tested in inference.significance({n: of["max"] for n, of in run.evidence.items()}, name).items():
            found[f"{layer} tests of {name}"] = torch.stack([tested.p, tested.p_layer, tested.p_adjusted, tested.q])
    leaders = stability.snapshot({n: of["max"] for n, of in run.evidence.items()}).leaders
    found["leaders"] = repr(leaders)
    found["plan"] = repr((planning.samples_to_see(5, 0.01, 0.05), planning.detectable_correlation(400)))
    steering = select(run, strategy="all")
    steering.save(folder / "steering.safetensors")
    steering = Steering.load(folder / "steering.safetensors")
    return found | {"features": repr(steering.features), "directions": steering.directions}


@pytest.fixture(scope="module")
def model():
    return tiny_pipeline.model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("usual")


@pytest.fixture(scope="module")
def usual(model, folder):
    """The results under PyTorch's own defaults."""
    return whole_way(model, folder)


@pytest.mark.parametrize("defaults", [name for name in DEFAULTS if name != "meta"])
def test_the_whole_way_gives_the_same_results_under_any_default(model, usual, tmp_path, defaults):
    with DEFAULTS[defaults]():
        got = whole_way(model, tmp_path)
    assert_the_same(got, usual)


def test_what_a_run_says_is_the_same_where_the_default_device_holds_no_numbers(usual, folder):
    with torch.device("meta"):
        got = said_of(folder)
    assert_the_same(got, {name: usual[name] for name in got})


def of_prompts(z, y, groups):
    """What evidence says of prompts with several samples, and the interval of a few of their features."""
    found = {}
    for within in (False, True):
        evidence = Evidence(z.shape[1], permutations=19, bootstrap=30, within=within)
        evidence.update(z, y, 0, groups=groups)
        found |= {f"{name}, {within}": getattr(evidence, name) for name in Evidence.STATE}
        found[f"p, {within}"] = inference.significance({0: evidence})[0].p_adjusted
        for name, ends in (
            ("bootstrap", inference.bootstrap_interval(evidence)),
            ("cluster", inference.cluster_interval(z[:, :3], y, groups, within=within)),
        ):
            found[f"{name}, {within}"] = torch.stack(ends)
    return found


@pytest.mark.parametrize("defaults", DEFAULTS)
def test_what_is_said_of_prompts_with_several_samples_is_the_same_under_any_default(defaults):
    generator = torch.Generator(device="cpu").manual_seed(0)
    z, y = (torch.rand(*size, generator=generator, dtype=torch.float32, device="cpu") for size in ((48, 5), (48,)))
    groups = [i // 4 for i in range(48)]
    expected = of_prompts(z, y, groups)
    with DEFAULTS[defaults]():
        got = of_prompts(z, y, groups)
    assert_the_same(got, expected)


def assert_the_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert got[name].dtype == value.dtype and torch.equal(got[name].nan_to_num(7), value.nan_to_num(7)), name
        else:
            assert got[name] == value, name


def problems(device):
    return [
        make(Case(activation, "bf16x2", F32, norm=norm, d_sae=d_sae), device)
        for activation, norm, d_sae in (("jumprelu", "layer_norm", 37), ("topk", "none", 40), ("gated", "none", 37))
    ]


def of_operations(problems, place):
    """What every operation makes of problems, at a place."""
    found, y = {}, torch.linspace(-1, 2, 6, dtype=torch.float64, device=place.device)
    for problem in problems:
        name = problem.case.activation
        for pool, values in zip(("mean", "max"), pooled(problem, place)):
            found[f"{name} {pool}"] = values
        states = Moments(problem.case.d_sae, device=place.device), Moments(problem.case.d_sae, device=place.device)
        encode_update(problem.x, problem.cu, y, problem.encoder, states, "both", backend=place.backend)
        update_moments(found[f"{name} max"], y, states[0], backend=place.backend)
        for at, state in enumerate(states):
            found |= {f"{name} {at} {array}": t for array, t in zip(state.STATE, state.state())}
            found |= {f"{name} {at} r": state.correlation(), f"{name} {at} c": state.coefficient("contrastive")}
        found[f"{name} dense"] = encode(problem.x, problem.encoder, backend=place.backend)
        running = RunningPool(problem.encoder, 6, backend=place.backend)
        for _ in range(2):
            running.add(problem.x, problem.cu)
        found[f"{name} running"] = running.result("mean")
    weights = torch.ones(6, 3, dtype=torch.float64, device=place.device)
    sums = torch.zeros(37, 3, dtype=torch.float64, device=place.device)
    update_sums(found["jumprelu mean"], weights, sums, (2, 1), backend=place.backend)
    h = torch.ones(2, 3, 5, dtype=torch.bfloat16, device=place.device)
    row = torch.tensor([0, -1], dtype=torch.int32, device=place.device)
    vectors = torch.full((1, 5), 0.3, dtype=torch.float32, device=place.device)
    found |= {"sums": sums, "h": steer_add(h, vectors, row, backend=place.backend)}
    return found | (of_rows(found["jumprelu mean"], y, place.backend) if place.device == "cpu" else {})


def of_rows(pooled, y, backend):
    """What is said of stored rows."""
    backend = backend if backend == "native" else None  # rows have no kernels but those
    rows = SparseRows.from_dense(pooled, backend=backend)
    settings = {"permutations": 19, "bootstrap": 20, "device": "cpu", "backend": backend}
    moments, evidence = stored.statistics([(0, rows, y)], 37, **settings)
    found = {"features": rows.features.int(), "rows": rows.dense(), "moments of rows": moments.correlation()}
    for name in SCORES:
        tested = inference.significance({0: evidence}, name)[0]
        found |= {f"score {name}": scores.score(evidence, name), f"p {name}": tested.p, f"q {name}": tested.q}
    return found | {"interval": torch.stack(inference.interval(evidence, "bootstrap"))}


@everywhere((*REFERENCE, *NATIVE[:1], *TRITON))
@pytest.mark.parametrize("defaults", DEFAULTS)
def test_every_operation_gives_the_same_results_under_any_default(place, defaults):
    given = problems(place.device)
    expected = of_operations(given, place)
    with DEFAULTS[defaults]():
        got = of_operations(given, place)
    assert_the_same(got, expected)


def factories(path):
    """Calls in a file that make a tensor, and what each of them says."""
    names = {function.__name__ for function in FACTORIES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch" and node.func.attr in names:
                yield node.lineno, {keyword.arg for keyword in node.keywords}


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_tensor_is_made_with_a_dtype_and_a_device(room):
    found = {path: list(factories(path)) for path in room.rglob("*.py")}
    assert found
    without = [
        f"{path.relative_to(ROOT)}:{line}"
        for path, calls in found.items()
        for line, said in calls
        if not {"dtype", "device"} <= said
    ]
    assert not without, without
