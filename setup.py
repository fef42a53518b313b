"""What pyproject.toml cannot say: the packages' folders and the C++ extension."""

import re
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "corrsteer" / "__init__.py").read_text())[1]

# optional: where no C++ compiler is found the package still installs, and `corrsteer doctor` says what is missing.
native = Pybind11Extension("corrsteer._native", ["csrc/native.cpp"], cxx_std=17)
native.optional = True

setup(
    version=VERSION,
    # `kernels` is also the name of another package: ours is installed inside corrsteer, never at the top level.
    packages=[*find_packages(include=["corrsteer", "corrsteer.*"]), "corrsteer.kernels"],
    package_dir={"corrsteer": "corrsteer", "corrsteer.kernels": "kernels"},
    package_data={"corrsteer.demo": ["model/*", "sae/*/*"], "corrsteer.kernels": ["configs/*.json"]},
    ext_modules=[native],
)
