"""Triton kernels, with plain-PyTorch twins in the modules of the same names above; imported only when used."""
