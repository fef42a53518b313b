"""Microbenchmarks: `python -m bench.gpu`, `python -m bench.cpu`, and `python -m bench.table` for the README."""
