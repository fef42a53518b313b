"""The CUDA extension without a GPU: that its sources compile for every architecture without spills, and that the
kernel and the boundary do what they should, on a CPU. For a GPU it is among the backends of `test_operations.py`."""

import contextlib
import importlib.machinery
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import BF16, F16, F32

from corrsteer.ops import cuda_backend, reference, registry

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")


@needs_nvcc
@pytest.mark.parametrize("architecture", ("80", "90a", "100"))
def test_the_sources_compile_without_warnings_or_spills(architecture, tmp_path):
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    if f"sm_{architecture.rstrip('a')}" not in known:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    assert sources
    for source in sources:
        target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        strict = ["-Werror=all-warnings", "-Xptxas=-v,-warn-spills,-Werror"]
        command = [NVCC, "-std=c++17", "-O3", *strict, target, "-c", source, "-o", tmp_path / "out.o"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
        assert len(spills) == 6 and set(spills) == {("0", "0")}, done.stderr  # three dtypes, vectorised and not


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The extension with a CPU for a GPU."""
    if NVCC is None:
        pytest.skip("there is no nvcc, and so no headers for its types of numbers")
    import pybind11

    plan = subprocess.run([NVCC, "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    found = re.search(r'INCLUDES="(-I[^"]+)"', plan)
    if not found:
        pytest.skip("this nvcc does not say where its headers are")
    headers = found[1]
    out = tmp_path_factory.mktemp("emulated") / "_cuda.so"
    python = subprocess.run([sys.executable, "-m", "pybind11", "--includes"], capture_output=True, text=True).stdout
    sources = [ROOT / "csrc" / "cuda" / "module.cpp", ROOT / "tests" / "ops" / "cuda_on_cpu.cpp"]
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", *python.split(), headers, f"-I{ROOT / 'csrc' / 'cuda'}"]
    done = subprocess.run(["g++", *flags, *sources, "-o", out], capture_output=True, text=True)
    assert done.returncode == 0, (pybind11.__version__, done.stderr)
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(out))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_cuda", loader))
    loader.exec_module(module)
    return module


@pytest.fixture
def on_cpu(emulated, monkeypatch):
    """`cuda_backend.steer_add`, of tensors on the CPU."""
    monkeypatch.setattr(cuda_backend, "_cuda", emulated)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # what torch calls the CPU
    return cuda_backend.steer_add


SHAPES = {  # B, S, d, and how h is laid out
    "a decode step": (5, 1, 2304, lambda h: h),
    "a few dimensions": (3, 4, 9, lambda h: h),
    "several blocks, the last not full": (2, 3, 1111, lambda h: h),
    "several blocks of vectorised threads": (2, 1, 2080, lambda h: h),
    "every other position": (4, 3, 32, lambda h: h.repeat_interleave(2, 1)[:, ::2]),
    "columns of a wider one": (4, 3, 32, lambda h: torch.cat([h, h], -1)[..., 32:]),
    "columns at an odd address": (4, 3, 32, lambda h: torch.cat([h[..., :1], h], -1)[..., 1:]),
    "transposed": (4, 3, 32, lambda h: h.permute(2, 1, 0).contiguous().permute(2, 1, 0)),
    "no rows": (0, 3, 32, lambda h: h),
    "no positions": (3, 0, 32, lambda h: h),
}


@pytest.mark.parametrize("dtype", (F32, F16, BF16), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", (False, True))
def test_the_kernel_adds_what_the_reference_adds(on_cpu, dtype, shape, masked):
    B, S, d, lay = SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    h = lay(torch.randn(B, S, d, generator=g).to(dtype))
    around = h.as_strided((h.untyped_storage().nbytes() // h.element_size(),), (1,), 0)
    vectors = torch.randn(3, d, generator=g) * 3
    rows = torch.randint(-1, 3, (2 * B,), generator=g, dtype=torch.int32)[::2]
    positions = (torch.rand(S, B, generator=g) > 0.4).T if masked else None
    expected = h.clone()
    reference.steer_add(expected, vectors, rows, positions)
    everything = around.clone()
    everything.as_strided(h.shape, h.stride(), h.storage_offset()).copy_(expected)
    on_cpu(h, vectors, rows, positions)
    assert torch.equal(h, expected) and torch.equal(around, everything)


def test_a_row_whose_vector_does_not_exist_is_left_alone(on_cpu):
    h, rows = torch.zeros(3, 1, 8), torch.tensor([7, -5, 1], dtype=torch.int32)
    on_cpu(h, torch.ones(2, 8), rows, None)
    assert h.sum(-1).flatten().tolist() == [0, 0, 8]


def test_it_is_launched_on_the_device_of_the_residual(on_cpu, monkeypatch):
    current = [0]

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor.get_device())
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    used = []
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: used.append((device, *current)) or 0)
    h = torch.zeros(1, 1, 8)
    on_cpu(h, torch.ones(1, 8), torch.zeros(1, dtype=torch.int32), None)
    assert bool((h == 1).all()) and used == [(-1, 0, -1)] and current == [0]


def arguments(**changes):
    """What the extension is called with for h [2, 3, 4], as a list, some of it changed."""
    given = dict(
        dtype="float32", h=H.data_ptr(), shape=H.shape, strides=H.stride(), vectors=V.data_ptr(), vectors_shape=V.shape,
        vectors_strides=V.stride(), rows=ROWS.data_ptr(), rows_stride=1, positions=0, positions_strides=(0, 0),
        stream=0,
    )  # fmt: skip
    return list((given | changes).values())


H, V, ROWS = torch.zeros(2, 3, 4), torch.ones(1, 4), torch.zeros(2, dtype=torch.int32)
HOSTILE = {
    "an unknown dtype": (dict(dtype="float64"), "dtype must be float32, float16 or bfloat16, got float64"),
    "a negative size": (dict(shape=(2, -3, 4)), "shape of h must not be negative, got -3"),
    "a negative stride": (dict(strides=(12, 4, -1)), "strides of h must not be negative, got -1"),
    "the same element twice": (dict(strides=(0, 4, 1)), "must not hold the same element twice"),
    "vectors of another width": (dict(vectors_shape=(1, 5)), r"vectors must be \[V, d=4\], got a width of 5"),
    "no memory": (dict(h=0), "address of h must be a multiple of 4, .* and not 0, got 0"),
    "no rows": (dict(rows=0), "address of row_vector must .* got 0"),
    "an address between elements": (dict(h=H.data_ptr() + 2), "address of h must be a multiple of 4"),
    "more blocks than a launch may have": (dict(shape=(2**20, 2**20, 4)), "at most 2147483647"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_argument_is_refused_before_anything_is_launched(emulated, name):
    changes, message = HOSTILE[name]
    with pytest.raises(ValueError, match=message):
        emulated.steer_add(*arguments(**changes))
    with pytest.raises(TypeError):
        emulated.steer_add(*arguments(shape=(2, 3)))
    assert not H.any()
    emulated.steer_add(*arguments())
    assert bool((H == 1).all())
    H.zero_()


def test_what_cuda_says_of_a_launch_that_failed_is_passed_on(emulated):
    with pytest.raises(RuntimeError, match="could not be launched: invalid resource handle"):
        emulated.steer_add(*arguments(stream=1))


def test_it_says_why_it_cannot_run(monkeypatch, emulated):
    def verdict(device="cuda", dtype=BF16):
        return cuda_backend.verify(registry.Call("steer_add", torch.device(device), dtype))

    assert not verdict("cpu").ok
    monkeypatch.setattr(cuda_backend, "_cuda", emulated)
    assert "float32" in verdict(dtype=torch.float64).fix
    for capability, ok in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert verdict().ok == ok
    monkeypatch.setattr(cuda_backend, "_cuda", None)
    monkeypatch.setattr(cuda_backend, "MISSING", "No module named 'corrsteer._cuda'", raising=False)
    assert "could not be imported" in verdict().reason and "CORRSTEER_CUDA=1 pip install" in verdict().fix
