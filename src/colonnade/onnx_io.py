"""Reading and writing ONNX files: every way a file can be bad is one line for the user. onnx is imported on use."""

import ast
import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from colonnade.errors import UserError

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

# Protobuf cannot hold more in one file; larger models keep their weights in a file of their own.
ONE_FILE_BYTES = 2**31 - 2**20
# how files of others begin (TFLite's has its mark behind four bytes), and what to do with them
FOREIGN = {
    b"PK\x03\x04": "an archive, as torch.save writes: load it in PyTorch and export it with torch.onnx.export",
    b"TFL3": "a TFLite model: convert it with tf2onnx",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes: convert it with tf2onnx",
}


def load_onnx(path: Path | str) -> "onnx.ModelProto":
    """The model of an ONNX file, its external data included.

    Raises UserError if the file is missing, unreadable, truncated, corrupt or no ONNX model, or if its external data
    is missing or too short.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    path = Path(path)
    if path.is_dir():
        what = "a TensorFlow SavedModel: convert it with tf2onnx" if (path / "saved_model.pb").exists() else "a folder"
        raise UserError(f"{path}: is {what}: expected an ONNX file")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: expected an ONNX model") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not content:
        raise UserError(f"{path}: the file is empty: expected an ONNX model")
    for start, what in FOREIGN.items():
        if content[:8].endswith(start) or content.startswith(start):
            raise UserError(f"{path}: no ONNX model, but {what}")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        raise UserError(f"{path}: not an ONNX model, or a truncated one: copy or export it again") from None
    del content
    if not model.ir_version or not model.opset_import or not (model.graph.node or model.graph.output):
        raise UserError(f"{path}: not an ONNX model: no graph in it")
    try:
        _load_external(model, path)
        for name, tensor in _tensors(model):
            _check_size(path, name, tensor)
        if model.ByteSize() < ONE_FILE_BYTES:
            onnx.checker.check_model(model)
    except UnicodeDecodeError:
        raise UserError(f"{path}: a name in it is not text: the file is corrupt") from None
    except onnx.checker.ValidationError as error:
        # Runtimes take outputs without a shape, and so do we.
        if "Field 'shape' of 'type' is required" not in str(error):
            raise UserError(f"{path}: not a valid ONNX model: {_one_line(error)}") from None
        _check_names(model, path)  # which the checker did not come to
    return model


def load_written_out(path: Path | str) -> "onnx.ModelProto":
    """`load_onnx`, with the model's own functions written out where that can be: layers within them are layers, too."""
    import onnx.inliner

    from colonnade.onnx_winograd import DOMAIN

    model = load_onnx(path)
    foreign = [(function.domain, function.name) for function in model.functions if function.domain != DOMAIN]
    if foreign:
        with contextlib.suppress(RuntimeError, ValueError):  # as for functions of another opset: then it stays as it is
            model = onnx.inliner.inline_selected_functions(model, foreign)
    return model


def check_samples(value: "onnx.ValueInfoProto", samples: "npt.NDArray[Any]") -> None:
    """Raises UserError where samples, along axis 0, do not have the shape of an input of a graph, or are none."""
    dims = list(value.type.tensor_type.shape.dim)
    fits = samples.ndim == len(dims) and all(
        not dim.dim_value or dim.dim_value == size for dim, size in zip(dims[1:], samples.shape[1:], strict=True)
    )
    if not fits or not len(samples):
        expected = "×".join(str(dim.dim_value) if dim.dim_value else "any" for dim in dims[1:])
        got = "×".join(map(str, samples.shape))
        raise UserError(
            f"what is given for input {value.name} is {got}: expected samples × {expected} (of photos, the "
            "preprocessing decides that)"
        )


def graph_inputs(graph: "onnx.GraphProto") -> "list[onnx.ValueInfoProto]":
    """What a graph is given at run time: old files list stored tensors among their inputs too."""
    stored = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in stored]


def node_name(node: "onnx.NodeProto") -> str:
    """What a node is called, or its output where it has no name."""
    return node.name or node.output[0]


def layer_of(weight: str) -> str:
    """The layer that a weight's name tells, as torch's do by their ending; empty where it tells none."""
    return weight.removesuffix(".weight") if weight.endswith(".weight") else ""


def module_of(node: "onnx.NodeProto") -> str:
    """The torch module that a node came from, as torch's exporter notes it; empty where it does not."""
    noted = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "[]")
    try:
        scopes = [str(scope) for scope in ast.literal_eval(noted)]
    except (ValueError, SyntaxError, TypeError):
        return ""
    return scopes[-2] if len(scopes) > 1 else ""


def save_onnx(model: "onnx.ModelProto", path: Path | str, *, force: bool = False) -> None:
    """Write a model: in one file, or beside `path` with its weights in `path`.data where protobuf's 2 GB are passed.

    The file appears whole or not at all. Raises UserError if it exists and force is not given, or cannot be written.
    """
    import onnx

    path = Path(path)
    check_writable(path, force=force)
    if model.ByteSize() < ONE_FILE_BYTES:
        content = model.SerializeToString()
        with writing_aside(path) as aside:
            aside.write_bytes(content)
        return
    data = path.with_name(path.name + ".data")
    check_writable(data, force=force)
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    with writing_aside(path) as aside, writing_aside(data) as aside_data:
        aside_data.unlink(missing_ok=True)  # onnx appends to what is there
        onnx.external_data_helper.convert_model_to_external_data(whole, location=aside_data.name, size_threshold=1024)
        onnx.external_data_helper.write_external_data_tensors(whole, str(path.parent))
        for _, tensor in _tensors(whole):
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = data.name
        aside.write_bytes(whole.SerializeToString())


def check_writable(path: Path, *, force: bool) -> None:
    """Raises UserError if `path` is a folder, exists without `force`, or its folder is missing or not writable."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder: expected the name of a file to write")
    if path.exists() and not force:
        raise UserError(f"{path}: exists already: choose another name or add --force")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}: create it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: the folder {path.parent} is not writable")


@contextlib.contextmanager
def writing_aside(path: Path) -> Iterator[Path]:
    """A name in the same folder to write to; renamed to `path` at the end, removed if anything fails."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield aside
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        aside.unlink(missing_ok=True)


def _check_names(model: "onnx.ModelProto", path: Path) -> None:
    """Every operator of the main graph reads what an input, a constant or another operator is."""
    graph = model.graph
    known = {"", *(value.name for value in graph.input), *(tensor.name for tensor in graph.initializer)}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    known |= {name for node in graph.node for name in node.output}
    for node in graph.node:
        for name in node.input:
            if name not in known:
                raise UserError(
                    f"{path}: {node.op_type} {node.name!r} reads {name!r}, which is nowhere: export it again"
                )


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:300]


def _tensors(model: "onnx.ModelProto") -> Iterator[tuple[str, "onnx.TensorProto"]]:
    """Every constant of the main graph with its name."""
    for tensor in model.graph.initializer:
        yield tensor.name, tensor
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield node.output[0] if node.output else node.name, attribute.t


def _load_external(model: "onnx.ModelProto", path: Path) -> None:
    import onnx

    helper = onnx.external_data_helper
    load: Callable[..., None] = helper.load_external_data_for_tensor
    for name, tensor in _tensors(model):
        if not helper.uses_external_data(tensor):
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        try:
            load(tensor, str(path.parent))
        except (OSError, ValueError, RuntimeError, onnx.checker.ValidationError) as error:
            if not (path.parent / location).is_file():
                message = "is missing: put it beside the model"
            else:
                message = f"cannot be used: {_one_line(error)}"
            raise UserError(f"{path}: external data {location!r} of tensor {name!r} {message}") from None
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _check_size(path: Path, name: str, tensor: "onnx.TensorProto") -> None:
    """Raises UserError if raw data is not as long as the shape says (types of less than a byte are not checked)."""
    import onnx

    if not tensor.HasField("raw_data"):
        return
    try:
        item = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError):
        raise UserError(f"{path}: tensor {name!r} has the unknown data type {tensor.data_type}") from None
    expected = int(np.prod(tensor.dims, dtype=np.int64)) * item
    packed = "INT4" in (kind := onnx.TensorProto.DataType.Name(tensor.data_type)) or kind.endswith(
        ("FLOAT4E2M1", "INT2")
    )
    if not packed and len(tensor.raw_data) != expected:
        shape = "×".join(map(str, tensor.dims)) or "scalar"
        raise UserError(
            f"{path}: tensor {name!r} ({shape}) holds {len(tensor.raw_data)} bytes instead of {expected}: "
            "the file is truncated or corrupt"
        )
