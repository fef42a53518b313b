"""Rows and columns without zeros: nothing is lost, and their sums are those of the dense activations."""

import copy
import pickle

import numpy as np
import pytest
import torch
from places import NATIVE, REFERENCE, at
from safetensors.torch import load_file, save_file

from corrsteer import CorrSteerError
from corrsteer.ops import native_backend
from corrsteer.ops.rows import SparseColumns, SparseRows, concatenate, update_sparse_sums

HERE = pytest.mark.parametrize("place", [at(place) for place in (REFERENCE[0], *NATIVE)])
ANYWHERE = pytest.mark.parametrize("place", [at(place) for place in (*REFERENCE, *NATIVE)])


@pytest.fixture(autouse=True)
def _instruction_set(request, monkeypatch):
    place = request.node.callspec.params.get("place") if hasattr(request.node, "callspec") else None
    if place is not None and place.instruction_set:
        monkeypatch.setenv(native_backend.INSTRUCTION_SET, place.instruction_set)


def sparse_data(n=13, d=101, share=0.2, seed=0, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, d)) * (rng.random((n, d)) < share)
    return torch.from_numpy(z).to(dtype)


def test_of_what_is_not_zero_nothing_is_lost():
    z = sparse_data()
    z[0, 0], z[1, 5], z[2, 100], z[3, 7], z[4, 8] = torch.nan, torch.inf, -torch.inf, -0.0, 1e-45
    rows = SparseRows.from_dense(z)
    assert torch.equal(rows.dense().nan_to_num(7), z.nan_to_num(7)) and rows.n == len(rows) == 13
    assert len(rows.values) == int((z != 0).sum()) and bool(rows.values[0].isnan())
    assert rows.nbytes == 6 * len(rows.values) + 8 * 14


@ANYWHERE
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("d", (1, 15, 16, 48, 101, 1000))
def test_every_backend_finds_the_same(place, dtype, d):
    z = sparse_data(d=d, dtype=dtype)
    z[0, 0], z[1, d - 1], z[2, d // 2] = torch.nan, torch.inf, -0.0
    z[5] = 0
    rows = SparseRows.from_dense(z.to(place.device), backend=place.backend)
    sample, feature = np.nonzero(z.float().numpy())  # NaN is not 0, and -0 is
    assert rows.features.cpu().int().tolist() == feature.tolist()
    assert rows.offsets.cpu().diff().tolist() == np.bincount(sample, minlength=13).tolist()
    expected = z.float()[torch.from_numpy(sample), torch.from_numpy(feature)]
    assert torch.equal(rows.values.cpu().nan_to_num(7), expected.nan_to_num(7))
    assert (rows.values.dtype, rows.features.dtype) == (torch.float32, torch.uint16)


@HERE
def test_rows_that_lie_apart_and_no_rows_are_read_as_they_are(place):
    z = sparse_data(d=300)
    for some in (z[:, 7:207], z[::3], z[:, ::2], z[:0], torch.zeros(4, 50)):
        rows = SparseRows.from_dense(some, backend=place.backend)
        assert torch.equal(rows.dense(), some)


@HERE
def test_features_above_65536_take_four_bytes(place):
    z = torch.zeros(2, 65537)
    z[0, 65536], z[1, 65535] = 1, 2
    rows = SparseRows.from_dense(z, backend=place.backend)
    assert rows.features.dtype == torch.int32 and rows.features.tolist() == [65536, 65535]
    rows = SparseRows.from_dense(z[:, :-1], backend=place.backend)
    assert rows.features.dtype == torch.uint16 and rows.features.int().tolist() == [65535]


@pytest.mark.parametrize("d_sae", (48, 65_536, 65_537))
def test_rows_can_be_pickled_and_copied(d_sae):
    dense = torch.zeros(3, d_sae)
    dense[0, 1], dense[2, d_sae - 1] = 0.5, -2.0
    rows = SparseRows.from_dense(dense)
    for there in (pickle.loads(pickle.dumps(rows)), copy.deepcopy(rows)):
        assert there.features.dtype == rows.features.dtype and torch.equal(there.dense(), dense)


def test_some_samples_and_features_are_those_of_the_dense_rows():
    z = sparse_data()
    rows = SparseRows.from_dense(z)
    for index in (
        slice(None),
        slice(3, 9),
        slice(-2, None),
        slice(8, 3),
        slice(0, 13, 4),
        [5, 0, 5],
        torch.tensor([12]),
    ):
        expected = z[index]
        assert torch.equal(rows.rows(index).dense(), expected)
        assert torch.equal(rows.dense(index), expected)
        for features in (slice(10, 20), [3, 100, 1], torch.arange(101) > 50):
            assert torch.equal(rows.dense(index, features), expected[:, features])
    assert rows.rows(slice(3, 9)).values.data_ptr() == rows.values[rows.offsets[3] :].data_ptr()
    out = torch.full((13, 101), torch.nan)
    assert rows.dense(out=out) is out and torch.equal(out, z)


def test_rows_in_parts_are_put_together_again():
    z = sparse_data()
    rows = SparseRows.from_dense(z)
    assert torch.equal(
        concatenate([rows.rows(slice(0, 4)), rows.rows(slice(4, 4)), rows.rows(slice(4, 13))]).dense(), z
    )


def test_a_file_holds_rows_to_the_bit(tmp_path):
    rows = SparseRows.from_dense(sparse_data())
    save_file(rows.tensors(), tmp_path / "rows")
    again = SparseRows.from_tensors(load_file(tmp_path / "rows"), 101)
    for name, tensor in rows.tensors().items():
        assert torch.equal(getattr(again, name), tensor) and getattr(again, name).dtype == tensor.dtype


def test_columns_of_parts_are_the_columns_of_all_samples():
    z = sparse_data()
    rows = SparseRows.from_dense(z)
    columns = SparseColumns.from_rows([rows.rows(slice(0, 4)), rows.rows(slice(4, 13))], 101)
    assert torch.equal(columns.dense(), z) and (columns.n, columns.d_sae) == (13, 101)
    assert torch.equal(columns.dense(slice(5, 8)), z[5:8])
    some = torch.tensor([100, 3, 3])
    assert torch.equal(columns.take(some).dense(), z[:, some])
    for i in range(101):
        assert columns.samples[columns.offsets[i] : columns.offsets[i + 1]].tolist() == z[:, i].nonzero()[:, 0].tolist()


@ANYWHERE
@pytest.mark.parametrize("power", (1, 2, 3))
@pytest.mark.parametrize("width", (1, 7, 64, 100, 130))
@pytest.mark.parametrize(("n", "share"), ((13, 0.3), (2100, 0.001), (2100, 0.3)), ids=str)
def test_sums_of_columns_are_those_of_the_dense_activations(place, power, width, n, share):
    z = sparse_data(n, 40, share, seed=1)
    columns = SparseColumns.from_rows([SparseRows.from_dense(z)], 40)
    weights = torch.randn(n - 5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features = torch.tensor([39, 0, 5, 5, 17])
    sums = torch.ones(5, width + 9, dtype=torch.float64, device=place.device)
    into = sums[:, 4 : 4 + width]
    update_sparse_sums(columns, features, weights.to(place.device), into, first=3, power=power, backend=place.backend)
    expected = 1 + z[3 : n - 2, features].double().pow(power).T @ weights
    torch.testing.assert_close(into.cpu(), expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))
    assert bool((sums[:, :4] == 1).all()) and bool((sums[:, 4 + width :] == 1).all())


@HERE
def test_an_activation_that_is_not_a_number_spoils_its_own_feature_alone(place):
    z = sparse_data(n=70)
    z[3, 5] = torch.nan
    columns, weights = SparseColumns.from_rows([SparseRows.from_dense(z)], 101), torch.ones(70, 3, dtype=torch.float64)
    sums = torch.zeros(101, 3, dtype=torch.float64)
    update_sparse_sums(columns, torch.arange(101), weights, sums, backend=place.backend)
    assert sums.isnan().all(1).nonzero()[:, 0].tolist() == [5] and int(sums.isnan().sum()) == 3


@HERE
def test_sums_do_not_depend_on_which_features_are_asked_for_together_nor_on_the_threads(place):
    z = sparse_data(n=1500, d=60, share=0.3)
    columns = SparseColumns.from_rows([SparseRows.from_dense(z)], 60)
    weights = torch.randn(1500, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def sums(features):
        out = torch.zeros(len(features), 100, dtype=torch.float64)
        update_sparse_sums(columns, features, weights, out, backend=place.backend)
        return out

    every = sums(torch.arange(60))
    if place.backend == "native":
        assert torch.equal(torch.cat([sums(one) for one in torch.arange(60).split(1)]), every)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(sums(torch.arange(60)), every) or place.backend == "reference"
    finally:
        torch.set_num_threads(threads)


def tensors(**changed):
    return SparseRows.from_dense(sparse_data()).tensors() | changed


REFUSED = {
    "dense activations of three dimensions": (
        lambda: SparseRows.from_dense(torch.zeros(2, 3, 4)), r"pooled must be \[N, d_sae\] float32, .* got \[2, 3, 4\]",
    ),
    "activations that are whole numbers": (lambda: SparseRows.from_dense(torch.ones(2, 3).int()), "got .* torch.int32"),
    "no features": (lambda: SparseRows.from_dense(torch.zeros(2, 0)), "d_sae, .* must be a whole number of at least 1"),
    "values of another dtype": (
        lambda: SparseRows.from_tensors(tensors(values=torch.zeros(3).double()), 101),
        r"values must be \[\d+\] torch.float32 for d_sae=101",
    ),
    "features of another width": (lambda: SparseRows.from_tensors(tensors(), 70000), "features must .* torch.int32"),
    "a missing tensor": (lambda: SparseRows.from_tensors({}, 101), "tensors must hold .* got no values, features"),
    "a feature that does not exist": (lambda: SparseRows.from_tensors(tensors(), 50), r"features must lie in 0..49"),
    "offsets that fall": (
        lambda: SparseRows.from_tensors(tensors(offsets=tensors()["offsets"].flip(0)), 101), "offsets must rise from 0",
    ),
    "a sample that does not exist": (lambda: SparseRows.from_dense(sparse_data()).rows([13]), r"rows must .* in 0..12"),
    "a feature twice": (lambda: SparseRows.from_dense(sparse_data()).dense(features=[1, 1]), "each feature once"),
    "an output of another shape": (
        lambda: SparseRows.from_dense(sparse_data()).dense(out=torch.zeros(3)), r"out must be \[13, 101\] float32",
    ),
    "nothing to put together": (lambda: concatenate([]), "parts must hold at least one SparseRows"),
    "rows of other features": (
        lambda: concatenate([SparseRows.from_dense(torch.ones(1, 2)), SparseRows.from_dense(torch.ones(1, 3))]),
        "parts must be of the same features, got d_sae of 2, 3",
    ),
    "columns of other features": (
        lambda: SparseColumns.from_rows([SparseRows.from_dense(torch.ones(1, 2))], 3), "rows must have d_sae=3",
    ),
    "samples past the end": (lambda: add(first=1), "first must leave 13 samples of 13, got 1"),
    "weights of another dtype": (lambda: add(weights=torch.ones(13, 2)), r"weights must be \[n, C\] and sums"),
    "sums of another width": (lambda: add(sums=torch.zeros(101, 3).double()), r"and sums \[F=101, C\] float64, got"),
}  # fmt: skip


def add(**changed):
    columns = SparseColumns.from_rows([SparseRows.from_dense(sparse_data())], 101)
    given = {
        "features": torch.arange(101), "weights": torch.ones(13, 2).double(), "sums": torch.zeros(101, 2).double(),
    }  # fmt: skip
    update_sparse_sums(columns, **given | changed)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_by_name(name):
    act, message = REFUSED[name]
    with pytest.raises(CorrSteerError, match=message):
        act()


@pytest.mark.skipif(native_backend._native is None, reason="the native extension is not built")
@pytest.mark.parametrize(
    ("changed", "message"),
    (
        ({"offsets": torch.tensor([0, 2, 99])}, "offsets must rise from 0 to at most the number of values, 3"),
        ({"offsets": torch.tensor([0, 2, 1])}, "offsets must rise"),
        ({"offsets": torch.tensor([-1, 2, 3])}, "offsets must rise"),
        ({"features": torch.tensor([0, 2])}, "features must lie in 0..1, got 2"),
        ({"features": torch.tensor([-1, 0])}, "features must lie in 0..1, got -1"),
        ({"first": -1}, "first must lie in"),
        ({"power": 0}, "power must be at least 1, got 0"),
        ({"samples": torch.tensor([0, 1], dtype=torch.int32)}, r"samples must be \[3\] int32"),
        ({"weights": torch.ones(4, 3).double()}, r"weights must be \[-1, 2\] float64"),
    ),
)
def test_the_extension_reads_and_writes_only_what_it_was_given(changed, message):
    given = {
        "values": torch.ones(3), "samples": torch.tensor([0, 1, 1], dtype=torch.int32),
        "offsets": torch.tensor([0, 1, 3]), "features": torch.tensor([0, 1]), "weights": torch.ones(4, 2).double(),
        "first": 0, "power": 1, "sums": torch.zeros(2, 2).double(),
    } | changed  # fmt: skip
    arrays = {k: native_backend._array(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        native_backend._native.update_sparse_sums(native_backend.instruction_set(), **arrays, threads=1)


@HERE
def test_samples_that_do_not_rise_or_do_not_exist_are_left_out_and_nothing_else_is_read(place):
    if place.backend != "native":
        pytest.skip("torch checks indices itself")
    samples = torch.tensor([3, -5, 2_000_000_000, 1], dtype=torch.int32)
    columns = SparseColumns(torch.ones(4), samples, torch.tensor([0, 4]), 4)
    sums = torch.zeros(1, 2, dtype=torch.float64)
    update_sparse_sums(columns, torch.tensor([0]), torch.ones(4, 2).double(), sums)
    assert sums.tolist() == [[1, 1]]
