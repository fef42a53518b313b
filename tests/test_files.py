"""Files that are written whole or not at all, and what JSON can hold."""

import contextlib
import errno
import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from corrsteer import CorrSteerError, Evidence, Moments, Steering
from corrsteer.files import plain, to_json, write_utf8

STEERING = Steering.from_vectors({"blocks.1.hook_resid_post": torch.ones(3)})
WRITERS = {"steering": STEERING.save, "moments": Moments(3).save, "evidence": Evidence(3).save}


def fails(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ("safetensors.torch.save_file", "os.fsync", "os.replace"))
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(name, step, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(step, fails)
    with pytest.raises(CorrSteerError, match="file cannot be written .*No space left on device.*; give a path"):
        WRITERS[name](tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("code, said", ((errno.EIO, "may not last .*see to the disk"), (errno.EINVAL, None)))
def test_a_folder_whose_names_do_not_reach_the_disk_is_told_of_unless_it_cannot_be_asked(
    code, said, tmp_path, monkeypatch
):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(CorrSteerError, match=said) if said else contextlib.nullcontext():
        write_utf8(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_is_replaced_keeps_its_mode_and_the_link_to_it(name, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    WRITERS[name](tmp_path / "link")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "real" / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "real" / "file").chmod(0o640)
    WRITERS[name](tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path / "real") == ["file"]


@pytest.mark.parametrize("path", ("folder", "/dev/null", "none/file"))
def test_what_is_no_file_is_neither_replaced_nor_removed(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(CorrSteerError, match=f"^{path} cannot be written"):
        STEERING.save(path)
    assert Path("folder").is_dir() and Path("/dev/null").exists() and not Path("/dev/null").is_file()


def test_text_is_utf_8(tmp_path):
    write_utf8(tmp_path / "a", "é ±")
    assert (tmp_path / "a").read_bytes() == "é ±".encode()


def test_any_value_becomes_valid_json():
    value = {
        1: (torch.float32, Path("a/b"), {"b", "a"}), "nan": [math.nan, -math.inf, np.float32("nan")], "none": None,
        "tensor": torch.tensor([[1.0, math.inf]]), "scalar": np.int64(3), "array": np.arange(2), "yes": np.bool_(True),
        "text": "é", "bytes": b"x", "float": np.float64(0.5),
    }  # fmt: skip
    expected = {
        "1": ["torch.float32", "a/b", ["a", "b"]], "nan": ["nan", "-inf", "nan"], "none": None,
        "tensor": [[1.0, "inf"]], "scalar": 3, "array": [0, 1], "yes": True, "text": "é", "bytes": "b'x'", "float": 0.5,
    }  # fmt: skip
    assert plain(value) == json.loads(to_json(value)) == expected == plain(expected)
    loop = []
    loop.append(loop)
    with pytest.raises(CorrSteerError, match="a list that holds itself cannot be written as JSON"):
        to_json(loop)
