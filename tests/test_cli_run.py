"""`colonnade build` and `colonnade run` as a user calls them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import Builder
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from colonnade.cli import run_verb
from colonnade.errors import UserError
from colonnade.photo import IMAGENET, load_photo, preprocessing

RANDOM = np.random.default_rng(0)
SPEC = {"resize": 12, "crop": [8, 8], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convolution, ReLU, global pooling: [1, 3, 8, 8] -> [1, 6]."""
    weight = RANDOM.standard_normal((6, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["g"]),
        helper.make_node("Flatten", ["g"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes, "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 6])],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model") / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.fixture(scope="module")
def bundle(model: Path) -> Path:
    spec = model.with_name("spec.json")
    spec.write_text(json.dumps(SPEC))
    out = model.with_name("small.bundle")
    assert run_verb(["build", str(model), "-o", str(out), "--preprocess", str(spec)]) == 0
    return out


def test_names_in_brackets_are_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They look like what rich, which prints tables, takes for styles."""
    made, file = Builder(), tmp_path / "m[red]x.onnx"
    x, channels = made.input("x", (1, 3, 8, 8)), 3
    for name in ("net[bold]/conv", "[/x]"):
        x, channels = made.op("Conv", x, made.random(8, channels, 3, 3), name=name, pads=(1, 1, 1, 1)), 8
    onnx.save(made.build(x), file)
    pruned, out, page = tmp_path / "p[b].onnx", tmp_path / "b", tmp_path / "r.html"
    verbs = [
        ["inspect", str(file)], ["prune", str(file), "-o", str(pruned), "--sparsity", "0.5"],
        ["build", str(pruned), "-o", str(out)], ["report", str(out), "-o", str(page)],
        ["bench", str(pruned), "--blocks", "1"],
    ]  # fmt: skip
    for words in verbs:
        assert run_verb(words) == 0, capsys.readouterr().err
        said = capsys.readouterr().out
        shown = {"inspect": ["[/x]", "net[bold]"], "prune": ["[/x]", "net[bold]"], "report": ["[/x]"]}
        shown["bench"] = ["net[bold]"]  # which leaves out what stands behind the last slash
        assert all(name in said for name in shown.get(words[0], [])), words


@pytest.fixture
def array(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", RANDOM.standard_normal((1, 3, 8, 8)).astype(np.float32))
    return tmp_path / "x.npy"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(RANDOM.integers(0, 256, (20, 31, 3), np.uint8).astype(np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def expected(model: Path, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    return onnxruntime.InferenceSession(str(model)).run(None, {"image": x})[0]


def test_array_in_array_out(model: Path, bundle: Path, array: Path, tmp_path: Path) -> None:
    out = tmp_path / "y.npy"
    assert run_verb(["run", str(bundle), "--input", f"image={array}", "-o", str(out)]) == 0
    np.testing.assert_allclose(np.load(out), expected(model, np.load(array)), atol=1e-5)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x.npy", "y.npy"]


def test_archive_of_outputs(model: Path, bundle: Path, array: Path, tmp_path: Path) -> None:
    out = tmp_path / "y.npz"
    assert run_verb(["run", str(bundle), "--input", str(array), "-o", str(out)]) == 0
    with np.load(out, allow_pickle=False) as archive:
        np.testing.assert_allclose(archive["scores"], expected(model, np.load(array)), atol=1e-5)


def test_photo_prints_the_best_five(model: Path, bundle: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(["run", str(bundle), "--input", str(photo)]) == 0
    said = capsys.readouterr().out
    order = np.argsort(-expected(model, load_photo(photo, SPEC))[0])[:5]
    assert [int(index) for index in re.findall(r"(\d+) \(", said)] == list(order)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--input", "missing.npy"], "there is no such file"),
        (["--input", "other={array}"], "no input 'other'; its inputs: image"),
        (["--input", "{array}", "--input", "{array}"], "given twice"),
        (["--input", "{text}"], "neither an array (.npy) nor arrays (.npz) nor a photo ("),
        (["--input", "{pickle}"], "holds Python objects"),
        (["--input", "{wide}"], "shape (1, 3, 9, 9), expected (1, 3, 8, 8)"),
        (["--input", "{double}"], "type float64, expected float32"),
        (["--input", "{broken}"], "not a photo that can be read"),
        (["--input", "{array}", "-o", "nowhere/y.npy"], "there is no folder nowhere"),
        (["--input", "{array}", "-o", "y.txt"], "ends in .npy"),
        (["--input", "{array}", "--threads", "0"], "--threads"),
    ],
)
def test_bad_input_is_one_line(
    bundle: Path, array: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    files = {name: tmp_path / name for name in ("text.txt", "pickle.npy", "wide.npy", "double.npy", "broken.jpg")}
    files["text.txt"].write_text("hello")
    np.save(files["pickle.npy"], np.array([{"a": 1}], object), allow_pickle=True)
    np.save(files["wide.npy"], np.zeros((1, 3, 9, 9), np.float32))
    np.save(files["double.npy"], np.zeros((1, 3, 8, 8)))
    files["broken.jpg"].write_bytes(b"\xff\xd8\xff nothing")
    places = {"array": array} | {path.stem: path for path in files.values()}
    assert run_verb(["run", str(bundle), *(word.format(**places) for word in words)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


def test_photo_without_preprocessing_is_refused(
    model: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plain.bundle"
    assert run_verb(["build", str(model), "-o", str(out)]) == 0
    assert "untuned" in capsys.readouterr().out
    assert run_verb(["run", str(out), "--input", str(photo)]) == 2
    assert "--preprocess imagenet" in capsys.readouterr().err
    assert run_verb(["build", str(model), "-o", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert run_verb(["build", str(model), "-o", str(out), "--force"]) == 0


def test_imagenet_preprocessing_is_the_usual_one(tmp_path: Path) -> None:
    pixels = RANDOM.integers(0, 256, (300, 411, 3), np.uint8).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    found = load_photo(tmp_path / "p.png", preprocessing("imagenet"))
    resized = Image.fromarray(pixels).resize((350, 256), Image.Resampling.BILINEAR)
    middle = np.asarray(resized, np.float32)[16:240, 63:287] / 255
    wanted = (middle - IMAGENET["mean"]) / IMAGENET["std"]
    assert found.shape == (1, 3, 224, 224)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], wanted.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_a_photo_of_16_bits(tmp_path: Path, kind: str) -> None:
    """Scaled, where Pillow would make all but the darkest white."""
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / f"a.{kind}")
    spec = {"resize": None, "crop": None, "mean": [0.0], "std": [1.0]}
    found = load_photo(tmp_path / f"a.{kind}", spec)
    np.testing.assert_allclose(found[0, 0], ramp / 65535, atol=1 / 400)
    colour = load_photo(tmp_path / f"a.{kind}", {**spec, "mean": [0.0] * 3, "std": [1.0] * 3})
    np.testing.assert_array_equal(colour[0], np.repeat(found[0], 3, axis=0))


def test_a_photo_of_floats_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match=r"a\.tiff: its pixels are no whole numbers of 8 or 16 bits"):
        load_photo(tmp_path / "a.tiff", {"resize": None, "crop": None, "mean": [0.0], "std": [1.0]})


def test_a_photo_on_its_side_is_turned(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, 3:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    Image.fromarray(pixels).save(tmp_path / "p.png", exif=exif)
    found = load_photo(tmp_path / "p.png", {"mean": [0.0], "std": [1.0]})
    assert found.shape == (1, 1, 6, 4)
    assert found[0, 0, 0, 0] == 0
    assert found[0, 0, 5, 0] == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object"),
        ('{"mean": [0], "std": [0]}', "std"),
        ('{"mean": [0, 0], "std": [1, 1]}', "mean"),
        ('{"mean": [0], "std": [1], "size": 3}', "unknown key 'size'"),
        ('{"mean": [0], "std": [1], "resize": -3}', "resize"),
        ('{"mean": [0], "std": [1], "crop": 224}', "crop"),
    ],
)
def test_wrong_preprocessing_files(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        preprocessing(str(path))


def test_a_photo_too_small_to_crop(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(tmp_path / "p.png")
    with pytest.raises(UserError, match="too small"):
        load_photo(tmp_path / "p.png", SPEC | {"resize": None})
