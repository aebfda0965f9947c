"""The demonstration, shortened: the whole road, and what its table says is what the files do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from colonnade.cli import run_verb


@pytest.mark.slow
def test_the_whole_road(tmp_path: Path) -> None:
    from rich.console import Console

    from colonnade.demo import road

    folder = tmp_path / "demo"
    folder.mkdir()
    result = road.demo(
        folder, Console(quiet=True), epochs=4, retrain=2, budget=4, widths=(16, 32, 64), db=tmp_path / "db.sqlite"
    )
    assert result.accuracy_dense > 0.8
    assert result.accuracy_retrained > result.accuracy_pruned + 0.2
    # The compiled networks answer as torch does, to the image.
    assert result.accuracy_compiled_dense == result.accuracy_dense
    assert result.accuracy_compiled == result.accuracy_retrained
    assert result.weights_pruned < 0.5 * result.weights_dense
    assert json.loads((folder / "result.json").read_text())["speedup"] == result.speedup
    kept = [
        step["kept_macs"] / step["macs"]
        for step in json.loads((folder / "pruned.bundle" / "manifest.json").read_text())["steps"]
        if step["workload"].startswith("conv2d")
    ]
    assert sum(share < 0.3 for share in kept) == len(kept) - 1  # all but the stem


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert run_verb(["demo", "-o", str(tmp_path)]) == 2
    assert "choose another" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]
