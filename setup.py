"""What pyproject.toml cannot say: the packages' folders and the compiled extensions.

`corrsteer._native`, for CPUs, is built wherever there is a C++ compiler. Without one the package still installs, and
`corrsteer doctor` says what is missing.
"""

import os
import re
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "corrsteer" / "__init__.py").read_text())[1]

# A multiplication and an addition become one instruction, and comparisons need not mind floating-point exceptions;
# nothing else is loosened: sums keep their order, and NaN stays NaN.
COMPILE = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
LINK = []
if sys.platform == "linux":  # nothing but the init function: two packages' copies of a library must not meet
    COMPILE += ["-fopenmp"]
    LINK += ["-fopenmp", "-Wl,--version-script=csrc/exports.map"]
if os.environ.get("CORRSTEER_SANITIZE") == "1":  # see `make test-sanitize`
    COMPILE = [*COMPILE, "-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
    COMPILE += ["-fno-sanitize-recover=undefined"]
    LINK = ["-fopenmp", "-fsanitize=address,undefined"]


def sources(folder: str, *endings: str) -> list[str]:
    """Files of a folder in csrc/, relative to this one as setuptools wants them."""
    found = (HERE / "csrc" / folder).iterdir()
    return sorted(path.relative_to(HERE).as_posix() for path in found if path.suffix in endings)


native = Pybind11Extension(
    "corrsteer._native",
    sources("native", ".cpp"),
    depends=[*sources("native", ".h", ".inc"), "csrc/exports.map"],
    cxx_std=17,
    extra_compile_args=COMPILE,
    extra_link_args=LINK,
)
native.optional = True
ParallelCompile("CORRSTEER_BUILD_JOBS", default=0).install()

setup(
    version=VERSION,
    # `kernels` is also the name of another package: ours is installed inside corrsteer, never at the top level.
    packages=[*find_packages(include=["corrsteer", "corrsteer.*"]), "corrsteer.kernels"],
    package_dir={"corrsteer": "corrsteer", "corrsteer.kernels": "kernels"},
    package_data={"corrsteer.demo": ["model/*", "sae/*/*"], "corrsteer.kernels": ["configs/*.json"]},
    ext_modules=[native],
)
