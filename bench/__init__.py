"""Microbenchmarks: `python -m bench.gpu`, `python -m bench.cpu`, and `python -m bench.table` for the documents."""

import importlib.util
from pathlib import Path

import corrsteer

if importlib.util.find_spec("corrsteer.kernels") is None:  # a checkout that is not installed, where they lie beside it
    corrsteer.__path__.append(str(Path(__file__).parent.parent))
