"""Triton kernels, one file an operation.

`operations` launches them, `launch` and `configs/` say with which blocks; `product` is what the encoding kernels have
in common. Nothing here knows of models, or of the rest of corrsteer.
"""
