"""Kernels in plain PyTorch, of operators whose work is cut in pieces: one file an operator.

What the other backends do in C++ and Triton is a part of it, which they put in.
"""
