"""Triton kernels behind the ops of this package; imported only when a tensor needs them."""
