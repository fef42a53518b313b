"""Triton kernels, a file an operation: kernels, then what launches them.

`operations` is the table of them. `launch` and `configs/` say with which blocks; `matmul` is what the encoding kernels
have in common, `segment_reduce` how they pool. Nothing here knows of models, or of the rest of corrsteer.
"""
