"""What pyproject.toml cannot say: the packages' folders and the compiled extensions.

`corrsteer._native`, for CPUs, is built wherever there is a C++ compiler; without one the package still installs, and
says when it is first used what is missing. `corrsteer._cuda`, for NVIDIA GPUs, is built where nvcc is found;
CORRSTEER_CUDA=0 leaves it out, CORRSTEER_CUDA=1 insists on it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "corrsteer" / "version.py").read_text(encoding="utf-8"))[1]

# A multiplication and an addition become one instruction, and comparisons need not mind floating-point exceptions;
# nothing else is loosened: sums keep their order, and NaN stays NaN.
COMPILE = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
LINK, OPENMP = [], []
if sys.platform == "linux":
    LINK = ["-Wl,--version-script=csrc/exports.map"]  # nothing is exported but the init function
    OPENMP = ["-fopenmp"]
if os.environ.get("CORRSTEER_SANITIZE") == "1":  # see `make test-sanitize`
    COMPILE += ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    LINK += ["-fsanitize=address,undefined"]

CUDA_ARCHITECTURES = ("80", "90a", "100")  # sm_90a is Hopper's own
CUDA_PTX = "80"  # for every other GPU from sm_80 on, which the driver compiles it for
CUDA_COMPILE = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def sources(folder: str, *endings: str) -> list[str]:
    """Files of a folder in csrc/, relative to this one as setuptools wants them."""
    found = (HERE / "csrc" / folder).iterdir()
    return sorted(path.relative_to(HERE).as_posix() for path in found if path.suffix in endings)


def find_nvcc() -> str | None:
    """nvcc, if it is there and wanted."""
    wanted = os.environ.get("CORRSTEER_CUDA") or "auto"
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"CORRSTEER_CUDA must be 0, 1 or auto, got {wanted!r}")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = wanted != "0" and (shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc"))
    if wanted == "1" and not nvcc:
        sys.exit(
            "CORRSTEER_CUDA=1 needs nvcc, the compiler of the CUDA toolkit (12 or later), which is neither in "
            "CUDA_HOME/bin nor in PATH. Install the toolkit, or leave the CUDA kernels out: CORRSTEER_CUDA=0"
        )
    return nvcc or None


def library_folders(nvcc: str) -> list[str]:
    """Where nvcc itself links from; it need not lie beside the command, which may be a script."""
    plan = subprocess.run([nvcc, "--dryrun", "-o", os.devnull, "none.cu"], capture_output=True, text=True).stderr
    return re.findall(r'"-L([^"]+)"', "".join(line for line in plan.splitlines() if line.startswith("#$ LIBRARIES=")))


class BuildExtensions(build_ext):
    """Compiles an extension's .cu files with nvcc, and the rest as ever."""

    def build_extension(self, extension):
        objects = [self.compile_cuda(path) for path in getattr(extension, "cuda_sources", [])]
        extension.extra_objects = objects
        super().build_extension(extension)

    def compile_cuda(self, path: str) -> str:
        nvcc = find_nvcc()
        out = Path(self.build_temp, path).with_suffix(".o")
        out.parent.mkdir(parents=True, exist_ok=True)
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
        wanted = [a for a in CUDA_ARCHITECTURES if f"sm_{a.rstrip('a')}" in known]
        if not wanted:
            raise CompileError(f"nvcc must know one of sm_{', sm_'.join(CUDA_ARCHITECTURES)}, it knows {known}")
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in wanted]
        codes += [f"-gencode=arch=compute_{CUDA_PTX},code=compute_{CUDA_PTX}"]
        done = subprocess.run([nvcc, *CUDA_COMPILE, *codes, "-c", path, "-o", str(out)], cwd=HERE)
        if done.returncode:
            raise CompileError(f"nvcc could not compile {path}; to leave the CUDA kernels out: CORRSTEER_CUDA=0")
        return str(out)


native = Pybind11Extension(
    "corrsteer._native",
    sources("native", ".cpp"),
    depends=[*sources("native", ".h", ".inc"), "csrc/exports.map"],
    cxx_std=17,
    extra_compile_args=[*COMPILE, *OPENMP],
    extra_link_args=[*LINK, *OPENMP],
)
native.optional = True
extensions = [native]
if nvcc := find_nvcc():
    cuda = Pybind11Extension(
        "corrsteer._cuda",
        sources("cuda", ".cpp"),
        depends=[*sources("cuda", ".h", ".cu", ".cuh"), "csrc/exports.map"],
        cxx_std=17,
        extra_compile_args=COMPILE,
        extra_link_args=LINK,
        # the runtime is linked in, as the one that torch brings need not be of nvcc's version
        library_dirs=library_folders(nvcc),
        libraries=["cudart_static", "rt", "pthread", "dl"],
    )
    cuda.cuda_sources = sources("cuda", ".cu")
    cuda.optional = os.environ.get("CORRSTEER_CUDA") != "1"
    extensions += [cuda]
ParallelCompile("CORRSTEER_BUILD_JOBS", default=0).install()

setup(
    version=VERSION,
    # `kernels` is also the name of another package: ours is installed inside corrsteer, never at the top level.
    packages=[*find_packages(include=["corrsteer", "corrsteer.*"]), "corrsteer.kernels"],
    package_dir={"corrsteer": "corrsteer", "corrsteer.kernels": "kernels"},
    package_data={
        "corrsteer": ["py.typed"],
        "corrsteer.demo": ["model/*", "sae/*/*"],
        "corrsteer.kernels": ["configs/*.json"],
        "corrsteer.report.page": ["*.css", "*.js"],
    },
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtensions},
)
