"""Kernels: registry rows, bodies in C, and how a workload is bound to them."""
