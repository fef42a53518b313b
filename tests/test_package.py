"""The package as installed: what importing costs, and that a wheel is all it takes."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import corrsteer
from corrsteer.report import doctor


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


def test_the_command_line_says_what_it_can_without_importing_torch():
    heavy = {"torch", "numpy", "safetensors", "transformers", "sae_lens"}
    assert python(f"import corrsteer.cli, sys; print({heavy} & set(sys.modules))").strip() == "set()"


def test_every_public_name_can_be_imported_and_is_documented():
    assert set(corrsteer.__all__) == {*corrsteer._HOME, "__version__"}
    for name in corrsteer.__all__:
        assert getattr(corrsteer, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        corrsteer.nothing  # noqa: B018
    python("import corrsteer.runs.collect; import corrsteer; assert callable(corrsteer.collect), corrsteer.collect")


@pytest.mark.parametrize("where", ("the repository", "elsewhere"))
def test_kernels_are_not_taken_for_the_hugging_face_package_of_that_name(where, tmp_path, request):
    code = "import transformers, corrsteer.kernels; print(transformers.utils.is_kernels_available())"
    cwd = request.config.rootpath if where == "the repository" else tmp_path
    assert python(code, cwd=cwd).split() == ["False"]


def test_every_text_file_is_opened_with_its_encoding_and_not_the_locales(request):
    root = request.config.rootpath
    files = [root / "setup.py", *(path for folder in ("corrsteer", "kernels", "bench", "docs")
                                  for path in (root / folder).rglob("*.py"))]  # fmt: skip
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(getattr(node, "func", None), "attr", getattr(getattr(node, "func", None), "id", ""))
            of = getattr(getattr(getattr(node, "func", None), "value", None), "id", "")
            bytes_alone = of in ("os", "archive", "_OPENER")  # descriptors, members of zip files, and URLs
            if name in ("open", "read_text", "write_text", "fdopen") and not bytes_alone:
                binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in node.args)
                if not binary and "encoding" not in {keyword.arg for keyword in node.keywords}:
                    found.append(f"{path.relative_to(root)}:{node.lineno}")
    assert len(files) > 80 and not found, found


def test_no_top_level_module_named_kernels_is_installed(wheel, tmp_path):
    assert "kernels" not in importlib.metadata.packages_distributions()
    site = [name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()]
    assert "corrsteer" in site and "kernels" not in site


def test_the_readmes_example_is_ten_lines_and_runs_as_it_stands(tmp_path, request):
    (example,) = re.findall(r"```python\n(.*?)```", (request.config.rootpath / "README.md").read_text(), re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) == 10
    output = python(example, cwd=tmp_path)
    assert "Feature(hook_point='blocks.1.hook_resid_post'" in output and "99+33=?132" in output
    assert (tmp_path / "steering.safetensors").is_file()


def test_the_extension_says_which_instruction_sets_this_processor_offers():
    from corrsteer import _native

    sets = _native.instruction_sets()
    assert sets[-1] == "portable"
    assert ", ".join(sets) in doctor.examine()["extensions"]["native"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, request):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(request.config.rootpath)]
    unset = ("CORRSTEER_CUDA", "CUDA_HOME", "CUDA_PATH")  # nvcc is used where it is in PATH
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (file,) = out.glob("*.whl")
    return file


def test_a_wheel_holds_the_package_the_kernels_the_extension_and_the_demo_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"corrsteer"}
    assert {"corrsteer/kernels/__init__.py", "corrsteer/demo/model/model.safetensors"} <= set(names)
    assert sum(name.endswith("sae_weights.safetensors") for name in names) == 4
    assert {f"corrsteer/report/page/{name}" for name in ("style.css", "script.js")} <= set(names)
    assert any(name.startswith("corrsteer/_native.") for name in names)
    assert any(name.startswith("corrsteer/_cuda.") for name in names) == (shutil.which("nvcc") is not None)


def test_a_wheel_installs_and_its_command_runs_the_demo_from_another_directory(wheel, tmp_path):
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    where = python("import corrsteer._native as it; print(it.__file__)", cwd=tmp_path, env=environment)
    assert where.startswith(str(site))
    command = [sys.executable, str(site / "bin" / "corrsteer"), "demo", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["strategies"]) == {"single", "all", "pruned", "search"} and result["backends"] == ["native"]


def test_every_type_of_the_public_interface_is_known_to_a_type_checker(wheel, tmp_path):
    """As one that checks a user's code sees them: of the installed package, whose kernels are no interface."""
    environment = tmp_path / "venv"
    venv.create(environment, symlinks=True)
    (site,) = environment.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    shutil.rmtree(site / "corrsteer" / "kernels")
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    (tmp_path / "elsewhere").mkdir()
    checker = [str(Path(sys.executable).with_name("basedpyright")), "--verifytypes", "corrsteer", "--ignoreexternal"]
    active = os.environ | {"VIRTUAL_ENV": str(environment), "PATH": f"{environment / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(checker, capture_output=True, text=True, cwd=tmp_path / "elsewhere", env=active)
    assert "Type completeness score: 100%" in done.stdout, done.stdout[-3000:]


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_the_extensions_link_nothing_of_torchs_and_export_their_init_function_alone(wheel, tmp_path):
    system = r"lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+|gomp)\.so\.\d+|ld-linux.*"
    extensions = [name for name in zipfile.ZipFile(wheel).namelist() if ".so" in name]
    assert extensions
    for name in extensions:
        path = zipfile.ZipFile(wheel).extract(name, tmp_path)
        module = name.split("/")[-1].split(".")[0]
        linked = re.findall(r"NEEDED.*\[(.+)\]", output_of("readelf", "--dynamic", "--wide", path))
        assert linked and all(re.fullmatch(system, library) for library in linked), linked
        exported = [line.split()[-1] for line in output_of("nm", "--dynamic", "--defined-only", path).splitlines()]
        assert exported == [f"PyInit_{module}"]


# Building


def output_of(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout


def build(request, out, interpreter=sys.executable, **environment):
    """Build the extensions of this source into a folder."""
    command = [
        interpreter,
        "setup.py",
        "--quiet",
        "build_ext",
        "--build-lib",
        str(out),
        "--build-temp",
        str(out / "temp"),
    ]
    environment = os.environ | {"CORRSTEER_CUDA": "0"} | environment
    return subprocess.run(command, cwd=request.config.rootpath, env=environment, capture_output=True, text=True)


def interpreters():
    """Other supported versions of Python on this machine, by version."""
    found = {}
    for minor in range(10, 14):
        names = [shutil.which(f"python3.{minor}"), *Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python")]
        for name in filter(None, names):
            code = (
                "import sys, sysconfig, os; print(sys.version_info[1], os.path.isdir(sysconfig.get_paths()['include']))"
            )
            answer = subprocess.run([name, "-c", code], capture_output=True, text=True).stdout.split()
            if answer == [str(minor), "True"] and minor != sys.version_info.minor:
                found[f"3.{minor}"] = str(name)
    return found


@pytest.mark.parametrize(("version", "interpreter"), interpreters().items())
def test_the_extension_builds_and_runs_under_every_python_that_is_here(version, interpreter, tmp_path, request):
    tools = tmp_path / "tools"  # of this environment, but for what was compiled for this Python
    tools.mkdir()
    for package in ("setuptools", "_distutils_hack", "pkg_resources", "pybind11"):
        if spec := importlib.util.find_spec(package):
            (tools / package).symlink_to(Path(spec.origin).parent)
    environment = {"PYTHONPATH": str(tools), "PYTHONDONTWRITEBYTECODE": "1"}
    done = build(request, tmp_path, interpreter, **environment)
    assert done.returncode == 0, done.stderr
    (extension,) = (tmp_path / "corrsteer").glob("_native*.so")
    code = (
        "import importlib.util as u, sys; spec = u.spec_from_file_location('corrsteer._native', sys.argv[1]); "
        "m = u.module_from_spec(spec); spec.loader.exec_module(m); print(m.instruction_sets())"
    )
    assert "portable" in output_of(interpreter, "-c", code, str(extension))


def test_without_a_compiler_the_build_succeeds_without_the_extension(tmp_path, request):
    done = build(request, tmp_path, CC="false", CXX="false")
    assert done.returncode == 0, done.stderr
    assert 'building extension "corrsteer._native" failed' in done.stdout + done.stderr
    assert not list(tmp_path.glob("**/*.so"))


def test_cuda_kernels_that_are_insisted_on_without_nvcc_are_an_error_that_says_what_to_install(tmp_path, request):
    done = build(request, tmp_path, CORRSTEER_CUDA="1", PATH=str(tmp_path), CUDA_HOME=str(tmp_path))
    assert (
        done.returncode != 0 and "CORRSTEER_CUDA=1 needs nvcc" in done.stderr and "Install the toolkit" in done.stderr
    )
    done = build(request, tmp_path, CORRSTEER_CUDA="yes")
    assert done.returncode != 0 and "CORRSTEER_CUDA must be 0, 1 or auto, got 'yes'" in done.stderr
