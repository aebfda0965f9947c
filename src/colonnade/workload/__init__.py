"""Operator calls and their numpy definitions: one file an operator family."""

from colonnade.workload.base import NONE, RELU, RELU6, Activation, Array, Epilogue, Workload
from colonnade.workload.conv import Conv2d, Reach, im2col, matrix, unmatrix
from colonnade.workload.convert import Convert, Zeros
from colonnade.workload.linear import Linear
from colonnade.workload.pointwise import Affine, Binary, Softmax
from colonnade.workload.pool import GlobalPool, Pool2d
from colonnade.workload.transposed import ConvTranspose2d, Interleave

__all__ = [
    "NONE", "RELU", "RELU6", "Activation", "Affine", "Array", "Binary", "Conv2d", "ConvTranspose2d", "Convert", "Epilogue",
    "GlobalPool", "Interleave", "Linear", "Pool2d", "Reach", "Softmax", "Workload", "Zeros", "im2col", "matrix", "unmatrix",
]  # fmt: skip
