"""Kernels in plain PyTorch of operators whose work is cut into pieces: one file for each operator.

The other backends replace a part of this work with C++ or Triton.
"""
