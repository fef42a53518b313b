"""The package as installed: what importing costs, and that a wheel is all it takes."""

import json
import os
import subprocess
import sys
import zipfile

import pytest

import corrsteer
from corrsteer import doctor


def python(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **options).stdout


def test_importing_corrsteer_takes_under_half_a_second_beyond_torch_and_no_heavy_libraries():
    code = (
        "import time, torch; start = time.perf_counter(); import corrsteer; "
        "corrsteer.SparseEncoder, corrsteer.Moments, corrsteer.encode_update, corrsteer.steer_add; "
        "print(time.perf_counter() - start); import sys; "
        "print(sorted({'sae_lens', 'transformers', 'transformer_lens', 'datasets', 'typer'} & set(sys.modules)))"
    )
    runs = [python(code).splitlines() for _ in range(3)]
    assert all(loaded == "[]" for _, loaded in runs)
    assert min(float(seconds) for seconds, _ in runs) < 0.5


def test_every_public_name_can_be_imported_and_is_documented():
    for name in corrsteer.__all__:
        assert getattr(corrsteer, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        corrsteer.nothing  # noqa: B018
    python("import corrsteer.collection; import corrsteer; assert callable(corrsteer.collect), corrsteer.collect")


def test_kernels_are_installed_only_inside_corrsteer(tmp_path):
    assert "corrsteer.kernels" in python("import corrsteer.kernels; print(corrsteer.kernels.__name__)", cwd=tmp_path)


def test_the_extension_says_which_instruction_sets_this_processor_offers():
    from corrsteer import _native

    sets = _native.instruction_sets()
    assert sets[-1] == "portable"
    assert ", ".join(sets) in doctor.examine()["extension"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, request):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(request.config.rootpath)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (file,) = out.glob("*.whl")
    return file


def test_a_wheel_holds_the_package_the_kernels_the_extension_and_the_demo_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"corrsteer"}
    assert {"corrsteer/kernels/__init__.py", "corrsteer/demo/model/model.safetensors"} <= set(names)
    assert sum(name.endswith("sae_weights.safetensors") for name in names) == 4
    assert any(name.startswith("corrsteer/_native.") for name in names)


def test_a_wheel_unpacked_elsewhere_runs_the_demo_from_another_directory(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    where = python("import corrsteer; print(corrsteer.__file__)", cwd=elsewhere, env=environment)
    assert where.startswith(str(site))
    done = subprocess.run(
        [sys.executable, "-m", "corrsteer.cli", "demo", "--json"],
        capture_output=True,
        text=True,
        cwd=elsewhere,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["strategies"]) == {"single", "all", "pruned"}
