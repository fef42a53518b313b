"""Tensors that hold no numbers, or not one after the other, are refused by name wherever they are given."""

import pytest
import torch

from corrsteer import CorrSteerError, Moments, SparseEncoder, encode
from corrsteer.ops import steer_add, update_moments
from corrsteer.ops.rows import SparseRows
from corrsteer.stats.evidence import Evidence

ONES = torch.ones(3, 4, dtype=torch.float32, device="cpu")
Y = torch.ones(3, dtype=torch.float32, device="cpu")
ROWS = torch.zeros(3, dtype=torch.int32, device="cpu")
TAKES = {
    "x": lambda t: encode(t, SparseEncoder.identity(4)),
    "pooled of moments": lambda t: update_moments(t, Y, Moments(4)),
    "pooled of evidence": lambda t: Evidence(4).update(t, Y, 0),
    "pooled of rows": SparseRows.from_dense,
    "vectors": lambda t: steer_add(ONES[:, None].clone(), t, ROWS),
    "weight": lambda t: SparseEncoder(4, 3, "relu", weight=t, bias=Y),
}


@pytest.mark.parametrize("name", TAKES)
def test_a_sparse_tensor_is_refused(name):
    with pytest.raises(CorrSteerError, match=rf"^{name.split()[0]} must be dense, got a tensor of layout .*to_dense"):
        TAKES[name](ONES.to_sparse())


@pytest.mark.parametrize("name", [name for name in TAKES if "pooled of" in name and "moments" not in name])
def test_a_tensor_without_numbers_is_refused(name):
    with pytest.raises(CorrSteerError, match="pooled must hold numbers, got a tensor on the meta device"):
        TAKES[name](ONES.to("meta"))


@pytest.mark.parametrize("made", [Moments, Evidence])
def test_a_size_that_no_memory_has_room_for_is_refused(made):
    with pytest.raises(CorrSteerError, match="d_sae must be a whole number .*got 4611686018427387904"):
        made(2**62)


def test_evidence_that_says_it_is_huge_is_not_believed(tmp_path):
    Evidence(4).save(tmp_path / "e.safetensors")
    data = (tmp_path / "e.safetensors").read_bytes()
    (tmp_path / "e.safetensors").write_bytes(data.replace(b'\\"d_sae\\": 4', b'\\"d_sae\\": 9'))
    with pytest.raises(CorrSteerError, match="is damaged .*another shape than its settings say"):
        Evidence.load(tmp_path / "e.safetensors")
