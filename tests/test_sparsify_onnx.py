"""Pruning ONNX files: what is pruned, what stays dense, and every way a file can be bad."""

import errno
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from colonnade.errors import UserError
from colonnade.onnx_io import load_onnx, save_onnx
from colonnade.pattern import ColumnPattern, discover
from colonnade.sparsify.onnx_file import prune_file, read_layers
from colonnade.sparsify.select import as_matrix
from tests.models import Builder

PATTERN = ColumnPattern(0.75, 8)


def array(name, *shape, seed=0):
    values = np.random.default_rng([seed, *name.encode()]).standard_normal(shape).astype(np.float32)
    return numpy_helper.from_array(values / np.sqrt(np.prod(shape[1:])).astype(np.float32), name)


def network(*, constants=False):
    """Stem, plain, grouped and depthwise convolutions, two products, a Gemm and a classifier."""
    weights = [
        array("w_stem", 16, 3, 3, 3), array("w_plain", 20, 16, 3, 3), array("w_grouped", 24, 10, 1, 1),
        array("w_depth", 24, 1, 3, 3), array("w_gemm", 24, 30), array("w_right", 30, 18), array("w_flip", 18, 18),
        array("w_head", 18, 5),
    ]  # fmt: skip
    pads = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w_stem"], ["a"], "stem", **pads),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Conv", ["b", "w_plain"], ["c"], "plain", **pads),
        helper.make_node("Conv", ["c", "w_grouped"], ["d"], "grouped", group=2),
        helper.make_node("Conv", ["d", "w_depth"], ["e"], "depth", group=24, **pads),
        helper.make_node("GlobalAveragePool", ["e"], ["f"], "pool"),
        helper.make_node("Flatten", ["f"], ["g"], "flat"),
        helper.make_node("Gemm", ["g", "w_gemm"], ["h"], "gemm"),
        helper.make_node("MatMul", ["h", "w_right"], ["i"], "right"),
        helper.make_node("Transpose", ["w_flip"], ["flipped"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["i", "flipped"], ["j"], "flip"),
        helper.make_node("MatMul", ["j", "w_head"], ["y"], "head"),
    ]
    if constants:
        nodes = [helper.make_node("Constant", [], [w.name], f"c_{w.name}", value=w) for w in weights] + nodes
        weights = []
    return model(nodes, weights, (1, 3, 9, 9), (1, 5))


def model(nodes, weights, shape, out):
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def weights_of(path):
    graph = load_onnx(path).graph
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found |= {n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in graph.node if n.op_type == "Constant"}
    return found


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.onnx"
    onnx.save(network(), path)
    return path


@pytest.mark.parametrize("constants", [False, True])
@pytest.mark.parametrize("pattern", [PATTERN, ColumnPattern.nm(1, 4, 4)])
def test_what_is_pruned_and_how(tmp_path, constants, pattern):
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(network(constants=constants), source)
    report = prune_file(source, out, pattern)
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons == {
        "stem": "stem", "plain": None, "grouped": None, "depth": "depthwise",
        "gemm": None, "right": None, "flip": None, "head": "classifier",
    }  # fmt: skip
    before, after = weights_of(source), weights_of(out)
    groups = {"w_plain": 1, "w_grouped": 2, "w_gemm": 1, "w_right": 1, "w_flip": 1}
    for name, old in before.items():
        new = after[name]
        if name not in groups:
            np.testing.assert_array_equal(new, old)
            continue
        np.testing.assert_array_equal(new[new != 0], old[new != 0])
        # x @ W has its rows last; so has a Gemm without transB, and a transposed weight has them first again.
        matrix = as_matrix(new.T if name in ("w_gemm", "w_right") else new)
        found = discover(matrix, groups[name])
        kept = pattern.kept(matrix.shape[1])
        assert ((matrix != 0).sum(axis=1) == kept).all()
        assert found.kept == kept * len(matrix)
        assert {len(tile.rows) for tile in found.tiles} - {pattern.tile} <= {2 * pattern.tile, 4, 2, 6}
    for layer in report.pruned:
        assert layer.kept == pattern.kept(layer.columns)
        assert 0 < layer.retained < 1


def test_the_result_runs_and_differs_only_by_its_weights(source, tmp_path):
    import onnxruntime

    out = tmp_path / "out.onnx"
    prune_file(source, out, PATTERN)
    x = np.random.default_rng(0).standard_normal((1, 3, 9, 9)).astype(np.float32)
    run = lambda path: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]  # noqa: E731
    dense, pruned = run(source), run(out)
    assert np.isfinite(pruned).all() and not np.allclose(dense, pruned)
    same = load_onnx(source)
    for tensor in same.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(weights_of(out)[tensor.name], tensor.name))
    assert same == load_onnx(out)
    onnx.checker.check_model(str(out), full_check=True)


def test_grouping_can_be_turned_off(source, tmp_path):
    on = prune_file(source, tmp_path / "on.onnx", PATTERN)
    off = prune_file(source, tmp_path / "off.onnx", PATTERN, group_rows=False)
    plain = as_matrix(weights_of(tmp_path / "off.onnx")["w_plain"]) != 0
    for first in range(0, 20, 8):
        assert (plain[first : first + 8] == plain[first]).all()
    gain = [a.retained - b.retained for a, b in zip(on.pruned, off.pruned, strict=True)]
    assert min(gain) >= -1e-6 and max(gain) > 0


def test_exclude_by_node_and_by_weight_name(source, tmp_path):
    report = prune_file(source, tmp_path / "out.onnx", PATTERN, exclude=["^plain$", "w_ri"])
    assert [layer.name for layer in report.pruned] == ["grouped", "gemm", "flip"]


def named(*weights, modules=()):
    """1x1 convolutions one behind the other, numbered as torch's exporter does, of weights that are called so."""
    stored = {name: array(name, 16, 16, 1, 1) for name in weights}
    nodes = [
        helper.make_node("Conv", ["x" if at == 0 else f"v{at}", name], [f"v{at + 1}"], f"node_Conv_{at}")
        for at, name in enumerate(weights)
    ]
    for node, module in zip(nodes, modules, strict=False):
        scopes = ["", "body", module, "conv2d"]
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(scopes))
    nodes[-1].output[0] = "y"
    return model(nodes, list(stored.values()), (1, 16, 5, 5), (1, 16, 5, 5))


def names(network):
    return [report.name for report, _ in read_layers(network)]


def test_layers_are_called_by_their_weights():
    assert names(named("a.0.weight", "a.1.weight")) == ["a.0", "a.1"]
    assert names(named("a.0.weight", "onnx::7", modules=["a.0", "a.1"])) == ["a.0", "a.1"]
    assert names(named("a.weight", "onnx::7")) == ["a", "node_Conv_1"]
    # shared weights, a module called twice, and the name of another layer's node say nothing
    assert names(named("a.weight", "a.weight", "b.weight")) == ["node_Conv_0", "node_Conv_1", "b"]
    assert names(named("v", "w", modules=["a", "a"])) == ["node_Conv_0", "node_Conv_1"]
    assert names(named("node_Conv_1.weight", "w")) == ["node_Conv_0", "node_Conv_1"]
    assert names(named("node_Conv_0.weight", "w")) == ["node_Conv_0", "node_Conv_1"]


def test_a_layer_may_be_called_by_its_node_too(tmp_path):
    source, out = tmp_path / "m.onnx", tmp_path / "out.onnx"
    onnx.save(named("stem.weight", "a.0.weight", "a.1.weight"), source)
    half = ColumnPattern(0.5, 8)
    for name in ("a.1", "node_Conv_2"):
        report = prune_file(source, out, None, patterns={name: half}, force=True)
        assert [(layer.name, layer.node) for layer in report.pruned] == [("a.1", "node_Conv_2")]
        report = prune_file(source, out, half, patterns={name: None}, force=True)
        assert [layer.name for layer in report.pruned] == ["a.0"]
        report = prune_file(source, out, half, exclude=[f"^{name}$"], force=True)
        assert [layer.name for layer in report.pruned] == ["a.0"]
    with pytest.raises(UserError, match=r"layer a\.1 is named twice"):
        prune_file(source, out, None, patterns={"a.1": half, "node_Conv_2": None}, force=True)
    with pytest.raises(UserError, match=r"there is no layer 'a\.2'; the layers are: stem, a\.0, a\.1"):
        prune_file(source, out, None, patterns={"a.2": half}, force=True)


@pytest.mark.parametrize("regex", ["nothing_like_it", "plain("])
def test_bad_exclude_lists_the_layers(source, tmp_path, regex):
    with pytest.raises(UserError, match="plain, grouped"):
        prune_file(source, tmp_path / "out.onnx", PATTERN, exclude=[regex])
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def shared(other):
    """Two convolutions with one weight, and `other` behind them."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "one"),
        helper.make_node("Conv", ["a", "w"], ["b"], "two"),
        *other,
    ]
    return model(nodes, [array("w", 32, 32, 1, 1)], (1, 32, 4, 4), None)


def test_shared_weights_are_pruned_once(tmp_path):
    onnx.save(shared([helper.make_node("Relu", ["b"], ["y"])]), tmp_path / "in.onnx")
    report = prune_file(tmp_path / "in.onnx", tmp_path / "out.onnx", PATTERN)
    assert [layer.reason for layer in report.layers] == [None, "pruned with one"]
    assert ((as_matrix(weights_of(tmp_path / "out.onnx")["w"]) != 0).sum(axis=1) == 8).all()


def test_shared_weights_stay_dense_if_one_use_must(tmp_path):
    onnx.save(shared([helper.make_node("Relu", ["b"], ["y"])]), tmp_path / "in.onnx")
    report = prune_file(tmp_path / "in.onnx", tmp_path / "out.onnx", PATTERN, exclude=["two"])
    assert [layer.reason for layer in report.layers] == ["shares weights with two", "excluded by 'two'"]


def test_weights_used_by_another_operator_stay_dense(tmp_path):
    onnx.save(shared([helper.make_node("Mul", ["b", "w"], ["y"], "times")]), tmp_path / "in.onnx")
    report = prune_file(tmp_path / "in.onnx", tmp_path / "out.onnx", PATTERN)
    assert {layer.reason for layer in report.layers} == {"weights also used by Mul times"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(tmp_path, value):
    network_ = network()
    weights = numpy_helper.to_array(network_.graph.initializer[1]).copy()
    weights[1, 2, 0, 0] = value
    network_.graph.initializer[1].CopyFrom(numpy_helper.from_array(weights, "w_plain"))
    onnx.save(network_, tmp_path / "in.onnx")
    with pytest.raises(UserError, match="w_plain"):
        prune_file(tmp_path / "in.onnx", tmp_path / "out.onnx", PATTERN)
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_existing_output_needs_force(source, tmp_path):
    out = tmp_path / "out.onnx"
    out.write_bytes(b"mine")
    with pytest.raises(UserError, match="--force"):
        prune_file(source, out, PATTERN)
    assert out.read_bytes() == b"mine"
    prune_file(source, out, PATTERN, force=True)
    assert (weights_of(out)["w_plain"] == 0).any()
    prune_file(source, source, PATTERN, force=True)  # in place
    assert (weights_of(source)["w_plain"] == 0).any()


@pytest.mark.parametrize("out", ["no/such/folder/out.onnx", "."])
def test_output_that_cannot_be_written(source, tmp_path, out):
    with pytest.raises(UserError, match="folder"):
        prune_file(source, tmp_path / out, PATTERN)


def test_a_full_disk_leaves_nothing_behind(source, tmp_path, monkeypatch):
    def full(path, data):
        with path.open("wb") as file:
            file.write(data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left"):
        prune_file(source, tmp_path / "out.onnx", PATTERN)
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_external_data(source, tmp_path):
    apart = tmp_path / "apart"
    apart.mkdir()
    onnx.save(network(), apart / "in.onnx", save_as_external_data=True, location="in.data", size_threshold=0)
    prune_file(apart / "in.onnx", tmp_path / "a.onnx", PATTERN)
    prune_file(source, tmp_path / "b.onnx", PATTERN)
    a, b = weights_of(tmp_path / "a.onnx"), weights_of(tmp_path / "b.onnx")
    assert all(np.array_equal(a[name], b[name]) for name in b)

    data = (apart / "in.data").read_bytes()
    (apart / "in.data").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"external data|truncated"):
        load_onnx(apart / "in.onnx")
    (apart / "in.data").unlink()
    with pytest.raises(UserError, match=r"in\.data.*missing"):
        load_onnx(apart / "in.onnx")


def test_models_past_the_limit_of_one_file(tmp_path, monkeypatch):
    import colonnade.onnx_io as onnx_io

    original = network()
    monkeypatch.setattr(onnx_io, "ONE_FILE_BYTES", 5000)
    save_onnx(original, tmp_path / "big.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    assert (tmp_path / "big.onnx").stat().st_size < 5000
    again = weights_of(tmp_path / "big.onnx")
    assert all(np.array_equal(again[t.name], numpy_helper.to_array(t)) for t in original.graph.initializer)


def test_bad_files(source, tmp_path):
    bad = tmp_path / "bad.onnx"
    with pytest.raises(UserError, match="no such file"):
        load_onnx(tmp_path / "missing.onnx")
    with pytest.raises(UserError, match="folder"):
        load_onnx(tmp_path)
    whole = source.read_bytes()
    rng = np.random.default_rng(0)
    truncated = [whole[: len(whole) * part // 10] for part in range(1, 10)]
    for content in [b"", b"hello world, this is text", b"\x89PNG\r\n\x1a\n" * 20, rng.bytes(4000), *truncated]:
        bad.write_bytes(content)
        with pytest.raises(UserError) as caught:
            load_onnx(bad)
        assert str(bad) in str(caught.value) and "\n" not in str(caught.value)


def test_a_flipped_byte_is_an_error_or_a_model(source, tmp_path):
    whole = source.read_bytes()
    weights = [tensor.raw_data for tensor in onnx.load(source).graph.initializer]
    raw = set().union(*(range(at, at + len(data)) for data in weights for at in [whole.index(data)]))
    bad = tmp_path / "bad.onnx"
    for position in sorted(set(range(len(whole))) - raw)[::3]:
        broken = bytearray(whole)
        broken[position] ^= 0xFF
        bad.write_bytes(bytes(broken))
        try:
            prune_file(bad, tmp_path / "out.onnx", PATTERN, force=True, group_rows=False)
        except UserError as error:
            assert "\n" not in str(error)


def test_a_wrong_tensor_size_is_named(tmp_path):
    network_ = network()
    network_.graph.initializer[1].raw_data = network_.graph.initializer[1].raw_data[:-4]
    onnx.save(network_, tmp_path / "in.onnx")
    with pytest.raises(UserError, match="w_plain"):
        load_onnx(tmp_path / "in.onnx")


def test_layers_of_functions_are_layers(tmp_path):
    """torch's and others' exporters write modules as functions; weights behind an operator are said to be there."""
    opset = helper.make_opsetid("", 17)
    body = [helper.make_node("Conv", ["a", "w"], ["b"]), helper.make_node("Relu", ["b"], ["c"])]
    b = Builder()
    x = b.conv(b.input("x", (1, 16, 12, 12)), 16, 16, 3)
    turned = b.op("Transpose", b.random(3, 3, 32, 16), perm=(3, 2, 0, 1))
    b.nodes.append(helper.make_node("Block", [b.conv(x, 16, 16, 3), b.random(32, 16, 3, 3)], ["y"], domain="own"))
    b.nodes.append(helper.make_node("Conv", ["y", turned], ["z"], name="behind"))
    outputs = [helper.make_tensor_value_info("z", 1, None)]
    graph = helper.make_graph(b.nodes, "g", b.inputs, outputs, b.constants)
    function = helper.make_function("own", "Block", ["a", "w"], ["c"], body, [opset])
    opsets = [opset, helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=[function])
    onnx.save(model, tmp_path / "m.onnx")
    report = prune_file(tmp_path / "m.onnx", tmp_path / "p.onnx", ColumnPattern(0.5, 8))
    assert [layer.reason for layer in report.layers] == [
        "stem", None, None, "weights behind another operator (Transpose)"
    ]  # fmt: skip
    assert not onnx.load(tmp_path / "p.onnx").functions


def test_a_model_without_weights(tmp_path):
    onnx.save(model([helper.make_node("Relu", ["x"], ["y"])], [], (1, 3), (1, 3)), tmp_path / "in.onnx")
    with pytest.raises(UserError, match="nothing to prune"):
        prune_file(tmp_path / "in.onnx", tmp_path / "out.onnx", PATTERN)


def test_half_precision_weights_keep_their_type(tmp_path):
    weights = numpy_helper.from_array(np.random.default_rng(0).standard_normal((32, 32, 1, 1)).astype(np.float16), "w")
    half = model([helper.make_node("Conv", ["x", "w"], ["y"], "one")], [weights], (1, 32, 4, 4), None)
    for value in (*half.graph.input, *half.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(half, tmp_path / "in.onnx")
    prune_file(tmp_path / "in.onnx", tmp_path / "out.onnx", PATTERN)
    new = weights_of(tmp_path / "out.onnx")["w"]
    assert new.dtype == np.float16 and ((as_matrix(new) != 0).sum(axis=1) == 8).all()


def command(*words):
    import typer

    from colonnade.cli_prune import prune

    app = typer.Typer()
    app.command()(prune)
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_prints_layers_and_totals(source, tmp_path):
    result = command(source, "-o", tmp_path / "out.onnx", "--pattern", "1:4", "--exclude", "right", "--score", "l2")
    assert result.exit_code == 0, result.output
    assert "36 of 144" in result.output and "classifier" in result.output and "4 of 8 layers pruned" in result.output


@pytest.mark.parametrize(
    "words",
    [
        [], ["--sparsity", 0.5, "--pattern", "1:4"], ["--pattern", "1-4"], ["--pattern", "5:4"], ["--sparsity", 1.5],
        ["--pattern", "1:4", "--group", 4], ["--sparsity", 0.5, "--tile", 0], ["--sparsity", 0.5, "--score", "l3"],
        ["--sparsity", 0], ["--pattern", "4:4"], ["--sparsity", 0.5, "-o", "out.pt"],
    ],
)  # fmt: skip
def test_options_that_make_no_sense(source, tmp_path, words):
    result = command(source, "-o", tmp_path / "out.onnx", *words)
    assert isinstance(result.exception, UserError), result.output
    assert not (tmp_path / "out.onnx").exists()
