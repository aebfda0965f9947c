"""What all tests share: where the shared data lies, which tests are left out, and that CI skips nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers on two cores: more threads in each would only wait for each other. Before numpy or torch start theirs.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests too (CI=true does)")


def pytest_configure(config: pytest.Config) -> None:
    # A test that is named on the command line runs, however slow it is.
    named = any("::" in argument for argument in config.args)
    if not (CI or config.getoption("--slow") or config.option.markexpr or named):
        config.option.markexpr = "not slow"


def _forbid_skip(report: Any, allowed: bool) -> None:
    if CI and report.skipped and not hasattr(report, "wasxfail") and not allowed:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"CI=true and the test was skipped: {reason}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    outcome = yield
    _forbid_skip(outcome.get_result(), item.get_closest_marker("allow_skip") is not None)


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, None]:
    outcome = yield
    _forbid_skip(outcome.get_result(), False)  # a whole module that skips itself


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real weights and photos beside the checkout; its loaders can be imported."""
    if not (SHARED / "loaders").is_dir():
        pytest.skip("the shared test data (../shared/data beside the checkout) is not here")
    loaders = str(SHARED / "loaders")
    if loaders not in sys.path:
        sys.path.insert(0, loaders)
    return SHARED


@pytest.fixture(scope="session")
def torchvision_models() -> Any:
    """``torchvision.models``."""
    from tests.models import torchvision_zoo

    return torchvision_zoo()


@pytest.fixture
def half_qemu(monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of an emulator that knows Zvfh; ``Qemu`` targets, the instrument and what a test starts use it."""
    from half import MISSING, emulator

    path = emulator()
    if path is None:
        pytest.skip(MISSING)
    monkeypatch.setenv("COLONNADE_QEMU", path)
    return path
