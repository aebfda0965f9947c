"""Colonnade: column-wise N:M pruning, measured kernels, native bundles."""
