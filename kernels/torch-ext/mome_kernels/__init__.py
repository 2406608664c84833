"""Grouped expert kernels: torch ops with Triton and CPU implementations."""
