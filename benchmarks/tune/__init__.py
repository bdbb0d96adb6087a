"""Launch configurations of the Triton kernels, chosen by measuring."""
