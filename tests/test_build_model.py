"""``colonnade.build``: from an ONNX file to a bundle that computes what onnxruntime computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from models import onnxruntime_outputs
from onnx import TensorProto, helper, numpy_helper

import colonnade as cn
from colonnade.bundle import Bundle
from colonnade.errors import UserError


def small_model() -> onnx.ModelProto:
    """conv 3x3 (stride 2) + ReLU → conv 1x1 with 75 % of every row group's columns zero → pool → classifier."""
    rng = np.random.default_rng(0)

    def normal(name: str, *shape: int) -> onnx.TensorProto:
        values = rng.standard_normal(shape).astype(np.float32)
        if name == "w1":
            values[:, rng.permutation(shape[1])[: shape[1] * 3 // 4]] = 0
        return numpy_helper.from_array(values, name)

    constants = [
        normal("w0", 16, 3, 3, 3),
        normal("b0", 16),
        normal("w1", 8, 16, 1, 1),
        normal("w2", 5, 8),
        normal("b2", 5),
    ]
    nodes = [
        helper.make_node("Conv", ["photo", "w0", "b0"], ["a"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w1"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("Gemm", ["e", "w2", "b2"], ["scores"], transB=1),
    ]
    ports = [("photo", ["n", 3, 17, 23]), ("scores", ["n", 5])]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ports]
    graph = helper.make_graph(nodes, "small", infos[:1], infos[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    onnx.save(small_model(), tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


def photo(batch: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((batch, 3, 17, 23)).astype(np.float32)


@pytest.mark.parametrize("batch, threads", [(1, 1), (3, 2)])
def test_equals_onnxruntime(file: Path, tmp_path: Path, batch: int, threads: int) -> None:
    bundle = cn.build(file, threads=threads, batch=batch, out=tmp_path / "out", db=tmp_path / "tuning.db")
    wanted = onnxruntime_outputs(small_model(), {"photo": photo(batch)})["scores"]
    with cn.Session(bundle.path) as session:
        assert session.threads == threads
        got = session.run({"photo": photo(batch)})["scores"]
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_tuned_build_says_so_and_gives_the_same(file: Path, tmp_path: Path) -> None:
    records = tmp_path / "tuning.db"
    plain = cn.build(file, out=tmp_path / "plain", db=records)
    tuned = cn.build(file, out=tmp_path / "tuned", db=records, tune=True, budget=20, isa="portable")
    assert plain.manifest["tuning"]["untuned"] == plain.manifest["tuning"]["tunable"] > 0
    assert tuned.manifest["tuning"]["untuned"] < tuned.manifest["tuning"]["tunable"]
    with cn.Session(plain.path) as one, cn.Session(tuned.path) as two:
        feeds = {"photo": photo(1)}
        np.testing.assert_allclose(one.run(feeds)["scores"], two.run(feeds)["scores"], rtol=1e-4, atol=1e-5)


def test_manifest_carries_the_preprocessing(file: Path, tmp_path: Path) -> None:
    wanted = {"resize": None, "crop": [17, 23], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    cn.build(file, out=tmp_path / "out", db=tmp_path / "t.db", preprocess=wanted)
    assert Bundle.load(tmp_path / "out").manifest["preprocess"] == wanted


def test_default_place_is_named_after_the_model(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cn.build(file, db=tmp_path / "t.db").path == Path("small.bundle")
    with pytest.raises(UserError, match="--force"):
        cn.build(file, db=tmp_path / "t.db")


def test_mistakes_leave_nothing(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for error, words, options in [
        (UserError, "threads 0", {"threads": 0}),
        (UserError, "unknown target", {"target": "moon"}),
        (UserError, "cannot run ISA 'mmx'", {"isa": "mmx"}),
        (UserError, "no such compiler", {"cc": "no-such-compiler"}),
        (UserError, "preprocess", {"preprocess": {"mean": 3}}),
    ]:
        with pytest.raises(error, match=words) as caught:
            cn.build(file, out=out, db=tmp_path / "t.db", **options)
        assert "\n" not in str(caught.value)
    assert not out.exists() and not list(tmp_path.glob(".out*"))
