"""Triton kernels, one file an operation. None is written yet; `corrsteer doctor` shows which backends there are."""
