"""ONNX models for tests: small ones built node by node, and networks exported by torch."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper


class Builder:
    """Collects nodes and constants: ``y = b.op("Relu", x)``; names of values are strings."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> str:
        """A model input; strings are free sizes."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def constant(self, array: npt.ArrayLike, name: str = "") -> str:
        """An initializer; Python floats become float32, ints int64."""
        values = np.asarray(array)
        values = values.astype(np.float32) if values.dtype == np.float64 else values
        name = name or f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def random(self, *shape: int, scale: float = 1.0, name: str = "") -> str:
        """A random initializer."""
        return self.constant((self.rng.standard_normal(shape) * scale).astype(np.float32), name)

    def op(self, kind: str, *inputs: str, outputs: int = 1, name: str = "", **attributes: Any) -> Any:
        """A node; the name of its output, or a list of names when there are several."""
        label = name or f"{kind.lower()}{len(self.nodes)}"
        names = [f"{label}_out{i}" if outputs > 1 else f"{label}_out" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=label, **attributes))
        return names if outputs > 1 else names[0]

    def conv(
        self, x: str, ins: int, outs: int, kernel: int | tuple[int, int] = 1, groups: int = 1, **attributes: Any
    ) -> str:
        """A convolution with random weights and bias."""
        kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
        scale = float(np.sqrt(2.0 / (ins // groups * kh * kw)))
        label = f"conv{len(self.nodes)}"
        weight = self.random(outs, ins // groups, kh, kw, scale=scale, name=f"{label}.weight")
        bias = self.random(outs, name=f"{label}.bias")
        return str(self.op("Conv", x, weight, bias, name=label, group=groups, **attributes))

    def batch_norm(self, x: str, channels: int) -> str:
        """A BatchNormalization with random statistics."""
        variance = self.constant(self.rng.uniform(0.5, 2, channels))
        mean = self.random(channels)
        gamma = self.constant(self.rng.uniform(0.5, 2, channels))
        return str(self.op("BatchNormalization", x, gamma, self.random(channels), mean, variance))

    def build(self, *outputs: str, opset: int = 18) -> onnx.ModelProto:
        """The model, with all shapes that can be inferred."""
        outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "test", self.inputs, outs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        return onnx.shape_inference.infer_shapes(model)


def bottlenecks(batch: int = 1, size: int = 11, blocks: int = 3) -> onnx.ModelProto:
    """A residual network in small: a strided convolution, bottleneck blocks, a strided projection, one block more."""
    b = Builder()
    x = b.op("Relu", b.conv(b.input("x", (batch, 3, 2 * size, 2 * size)), 3, 16, 3, pads=(1, 1, 1, 1), strides=(2, 2)))
    y = b.conv(x, 16, 40)
    for _ in range(blocks):
        z = b.op("Relu", b.conv(y, 40, 12))
        z = b.op("Relu", b.conv(z, 12, 12, 3, pads=(1, 1, 1, 1)))
        y = b.op("Relu", b.op("Add", b.conv(z, 12, 40), y))
    short = b.conv(y, 40, 48, strides=(2, 2))
    z = b.op("Relu", b.conv(y, 40, 16))
    z = b.op("Relu", b.conv(z, 16, 16, 3, pads=(1, 1, 1, 1), strides=(2, 2)))
    y = b.op("Relu", b.op("Add", b.conv(z, 16, 48), short))
    return b.build(b.op("GlobalAveragePool", y))


def onnxruntime_outputs(model: onnx.ModelProto, inputs: dict[str, npt.NDArray[np.float32]]) -> dict[str, Any]:
    """What onnxruntime computes, by name of output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs), strict=True))


def export(module: Any, *shape: int, dynamic: bool = False) -> onnx.ModelProto:
    """A torch module as torch's own exporter writes it; ``dynamic`` leaves the batch free."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            (torch.zeros(shape),),
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: "batch"},) if dynamic else None,
        )
    assert program is not None
    return program.model_proto


def torchvision_model(models: Any, name: str, **options: Any) -> Any:
    """A network of ``torchvision.models`` with random weights and BatchNorm statistics that are not trivial."""
    import torch

    torch.manual_seed(0)
    if name in ("googlenet", "inception_v3"):  # whose own way to draw weights takes minutes
        options["init_weights"] = False
    model = getattr(models, name)(weights=None, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.7, 1.5)
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.normal_(module.bias, std=0.2)
    return model.eval()


def torchvision_zoo() -> Any:
    """``torchvision.models``, also where torchvision's own compiled operators do not fit this build of torch."""
    import torch

    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        # It only wants to find these two names; no model for classification calls them.
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision._colonnade_library = library  # the definitions last as long as this object
    return torchvision.models
