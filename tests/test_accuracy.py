"""Accuracy with intervals: known values, coverage by simulation, folders, arrays, and every kind of model."""

import numpy as np
import onnx
import pytest
import torch
from models import Builder
from PIL import Image

from colonnade.accuracy import Accuracy, calibration_inputs, compare, evaluate, samples, wilson
from colonnade.errors import UserError

SPEC = {"resize": None, "crop": [8, 8], "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


def test_wilson_at_published_values():
    # Newcombe (1998), table I: 81 of 263, and 0 of 20.
    np.testing.assert_allclose(wilson(81, 263), (0.2553, 0.3662), atol=5e-5)
    np.testing.assert_allclose(wilson(0, 20), (0.0, 0.1611), atol=5e-5)
    with pytest.raises(UserError, match="no images"):
        wilson(0, 0)


def answers(correct):
    labels = np.zeros(len(correct), np.int64)
    return Accuracy(np.where(correct, 0, 1).astype(np.int64), labels)


def test_paired_interval_covers_and_is_narrower_than_two_single_ones():
    random = np.random.default_rng(0)
    covered, widths = 0, []
    for _ in range(400):
        base = random.random(300) < 0.8
        other = np.where(random.random(300) < 0.1, random.random(300) < 0.5, base)
        found = compare(answers(base), answers(other))
        truth = 0.1 * (0.5 - 0.8)
        covered += found.low <= truth <= found.high
        widths.append(found.high - found.low)
    assert 0.92 <= covered / 400 <= 0.99
    low, high = answers(random.random(300) < 0.8).interval
    assert np.mean(widths) < 1.2 * (high - low)


def test_difference_and_agreement():
    base, other = answers(np.array([1, 1, 1, 0], bool)), answers(np.array([1, 0, 0, 1], bool))
    found = compare(base, other)
    assert found.points == pytest.approx(-0.25) and found.agreement == 0.25 and found.images == 4
    assert found.low < found.points < found.high and "4 images" in str(found)
    with pytest.raises(UserError, match="same labelled images"):
        compare(base, answers(np.ones(3, bool)))


@pytest.fixture
def photos(tmp_path):
    """Three classes by colour, five photos each, and a file that is none."""
    for number, name in enumerate(("blue", "green", "red")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(5):
            pixels = np.random.default_rng(index).integers(0, 60, (10, 12, 3)).astype(np.uint8)
            pixels[..., 2 - number] += 150
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{index}.png")
    (tmp_path / "set" / "red" / "notes.txt").write_text("no photo")
    return tmp_path / "set"


def colours(batch):
    return batch.mean((2, 3))[:, ::-1]


def network(path, batch):
    """A network that answers with the brightest channel: blue, green or red."""
    b = Builder()
    x = b.input("x", [batch, 3, 8, 8])
    turn = b.constant(np.eye(3, dtype=np.float32)[::-1].copy())
    onnx.save(b.build(b.op("MatMul", b.op("Flatten", b.op("GlobalAveragePool", x)), turn)), path)
    return path


def test_folders_models_and_limits(photos, tmp_path):
    found = samples(photos, preprocess=SPEC)
    assert found.classes == ("blue", "green", "red") and found.inputs.shape == (15, 3, 8, 8)
    assert found.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    part = samples(photos, preprocess=SPEC, limit=6, seed=3)
    assert len(part) == 6 and not np.array_equal(part.labels, samples(photos, preprocess=SPEC, limit=6, seed=4).labels)
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3, bias=False))
    module[2].weight.data = torch.eye(3).flip(0)
    for model in (colours, module, network(tmp_path / "free.onnx", "n"), network(tmp_path / "four.onnx", 4)):
        result = evaluate(model, photos, preprocess=SPEC)
        assert result.top1 == 1.0 and result.images == 15 and result.top5.all()
    assert module.training
    wrong = evaluate(lambda batch: -colours(batch), photos, preprocess=SPEC)
    assert wrong.top1 == 0.0 and "15 images" in str(wrong)


def test_through_the_bundle(photos, tmp_path):
    import colonnade

    network(tmp_path / "m.onnx", 4)
    bundle = colonnade.build(tmp_path / "m.onnx", out=tmp_path / "b", preprocess=SPEC)
    compiled = evaluate(bundle.path, photos)  # the bundle knows its preprocessing
    assert compare(evaluate(tmp_path / "m.onnx", photos, preprocess=SPEC), compiled).agreement == 1.0


def test_arrays(tmp_path):
    x, y = np.random.default_rng(0).random((9, 3, 4, 4), np.float32), np.arange(9) % 3
    np.savez(tmp_path / "a.npz", inputs=x, labels=y)
    np.savez(tmp_path / "b.npz", left=x, right=x)
    np.save(tmp_path / "c.npy", x)
    assert np.array_equal(samples(tmp_path / "a.npz").labels, y)
    for source in (tmp_path / "c.npy", x, (x, y)):
        assert np.array_equal(samples(source).inputs, x)
    assert set(calibration_inputs(tmp_path / "b.npz")) == {"left", "right"}
    assert len(calibration_inputs(tmp_path / "a.npz", limit=4)["inputs"]) == 4
    with pytest.raises(UserError, match="no labels"):
        evaluate(lambda batch: batch.mean((2, 3)), x).top1  # noqa: B018


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.npz", "no such file"), ("empty", "no photos in it"), ("bad.npz", "neither an array"),
        ("text.txt", "expected a folder"), ("two.npz", "expected `inputs`"),
    ],
)  # fmt: skip
def test_bad_sources(tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.npz").write_text("no archive")
    (tmp_path / "text.txt").write_text("")
    np.savez(tmp_path / "two.npz", a=np.zeros(2), b=np.zeros(2))
    with pytest.raises(UserError, match=message):
        samples(tmp_path / source)


@pytest.mark.parametrize("labels", [[0.5, 1], [np.nan, 1], [-1, 0], ["cat", "dog"], [1j, 0]])
def test_labels_that_are_no_classes(labels, tmp_path):
    x = np.zeros((2, 3, 4, 4), np.float32)
    with pytest.raises(UserError, match=r"labels are .*: expected whole numbers from 0"):
        samples((x, labels))
    np.savez(tmp_path / "x.npz", inputs=x, labels=labels)
    with pytest.raises(UserError, match="expected whole numbers from 0"):
        samples(tmp_path / "x.npz")
    assert samples((x, [1.0, 2.0])).labels.tolist() == [1, 2]


@pytest.mark.parametrize("images", [np.float32(1), np.array(["a", "b"])])
def test_images_that_are_no_numbers(images, tmp_path):
    np.savez(tmp_path / "x.npz", inputs=images)
    with pytest.raises(UserError, match="expected numbers, image by image"):
        samples(tmp_path / "x.npz")


def test_images_of_another_type_or_shape_for_a_file(tmp_path):
    made = Builder()
    x = made.op("GlobalAveragePool", made.conv(made.input("x", ("n", 3, 4, 4)), 3, 5, 1))
    onnx.save(made.build(x), tmp_path / "m.onnx")
    pixels = np.random.default_rng(0).integers(0, 255, (6, 3, 4, 4))
    wanted = evaluate(tmp_path / "m.onnx", pixels.astype(np.float32)).answers
    for kind in (np.uint8, np.float64):
        np.testing.assert_array_equal(evaluate(tmp_path / "m.onnx", pixels.astype(kind)).answers, wanted)
    for wrong in (pixels[:, :2], pixels[..., 0]):
        with pytest.raises(UserError, match=r"given for input x is .*: expected samples × 3×4×4"):
            evaluate(tmp_path / "m.onnx", wrong.astype(np.float32))


def test_photos_beside_folders(tmp_path):
    """Folders without any photo are no classes then; photos in both places are not guessed about."""
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "notes").mkdir()
    found = samples(tmp_path, preprocess=SPEC)
    assert len(found) == 2 and found.labels is None
    Image.new("RGB", (8, 8)).save(tmp_path / "notes" / "c.png")
    with pytest.raises(UserError, match="photos beside folders of photos"):
        samples(tmp_path, preprocess=SPEC)


@pytest.mark.parametrize("shape", [(), (1,), (3, 4, 4), (1, 1, 1)])
def test_answers_that_are_no_classes(shape):
    """The largest of one number is always the same, and that of a map of scores is a pixel's."""
    with pytest.raises(UserError, match="expected a score for each of two classes or more"):
        evaluate(lambda batch: np.zeros((len(batch), *shape)), np.zeros((4, 3, 2, 2), np.float32))


def test_answers_on_maps_of_one_pixel():
    found = evaluate(lambda batch: np.zeros((len(batch), 3, 1, 1)), np.zeros((4, 3, 2, 2), np.float32))
    assert found.answers.shape == (4,)


def test_answers_that_are_none():
    x = np.zeros((4, 3, 2, 2), np.float32)
    with pytest.raises(UserError, match="NaN"):
        evaluate(lambda batch: np.full((len(batch), 3), np.nan), (x, np.zeros(4)))
    with pytest.raises(UserError, match="3 classes"):
        evaluate(lambda batch: np.zeros((len(batch), 3)), (x, np.full(4, 3)))
    with pytest.raises(UserError, match="one for each"):
        evaluate(lambda batch: np.zeros((len(batch), 3)), (x, np.zeros(3)))
