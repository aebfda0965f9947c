"""Operator calls and their numpy definitions: one file an operator family."""

from colonnade.workload.base import (
    NONE,
    RELU,
    RELU6,
    Activation,
    Array,
    Epilogue,
    Workload,
    activation_of,
    evaluate,
    with_activation,
    without_function,
)  # fmt: skip
from colonnade.workload.conv import Conv2d, Reach, im2col, is_depthwise, matrix, takes_every_second, unmatrix
from colonnade.workload.conv_pool import ConvPool
from colonnade.workload.convert import Convert, Precision, Zeros
from colonnade.workload.dense import (
    FILL,
    Constant,
    Elementwise,
    Join,
    Lookup,
    MatMul,
    Normalise,
    Reduce,
    Take,
    digest,
    spread,
)
from colonnade.workload.function import FUNCTIONS, Function
from colonnade.workload.linear import Linear
from colonnade.workload.pointwise import Affine, Binary, Softmax, Unary
from colonnade.workload.pool import GlobalPool, MaxIndices, Pool2d
from colonnade.workload.resample import Lrn, Resample
from colonnade.workload.tokens import ChannelNorm, ChannelSoftmax, PlaneProduct, Reorder
from colonnade.workload.transposed import ConvTranspose2d, Interleave, Repeat
from colonnade.workload.typed import Cast, TypedElementwise, TypedMatMul, TypedReduce
from colonnade.workload.winograd import WinogradConv2d

__all__ = [
    "FILL", "FUNCTIONS", "NONE", "RELU", "RELU6", "Activation", "Affine", "Array", "Binary", "Cast", "ChannelNorm",
    "ChannelSoftmax", "Constant", "Conv2d", "ConvPool", "ConvTranspose2d", "Convert", "Elementwise", "Epilogue",
    "Function", "GlobalPool", "Interleave", "Join", "Linear", "Lookup", "Lrn", "MatMul", "MaxIndices", "Normalise",
    "PlaneProduct", "Pool2d", "Precision", "Reach", "Reduce", "Reorder", "Repeat", "Resample", "Softmax", "Take",
    "TypedElementwise", "TypedMatMul", "TypedReduce", "Unary", "WinogradConv2d", "Workload", "Zeros", "activation_of",
    "digest", "evaluate", "im2col", "is_depthwise", "matrix", "spread", "takes_every_second", "unmatrix",
    "with_activation", "without_function",
]  # fmt: skip
