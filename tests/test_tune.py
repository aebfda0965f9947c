"""The tuner: what fails is recorded and never chosen, what is known is not measured again, what was stopped resumes.

Run as a program (``python test_tune.py DATABASE SLEEP_MS``) it tunes the sample step: the tests of interruption and
of shared databases start it so.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import Builder

from colonnade.build.toolchain import Toolchain
from colonnade.errors import UserError
from colonnade.frontend import imported
from colonnade.kernels import registry, render
from colonnade.kernels.isa import isa
from colonnade.kernels.registry import Candidate
from colonnade.layout import Planes, place
from colonnade.plan import Plan, Step
from colonnade.targets import Local
from colonnade.targets.peak import Peak
from colonnade.tune import network as meeting
from colonnade.tune import search, walks
from colonnade.tune import tune as tuning
from colonnade.tune.database import Database, Place, Record
from colonnade.tune.job import Run, expected, problem
from colonnade.tune.measure import Harness, Measurement
from colonnade.tune.network import HEATS, NETWORK, Standing, decide, rivals, siblings, standing
from colonnade.tune.search import judged
from colonnade.tune.tuner import Chooser, Tuner, source_digest
from colonnade.tune.tuner import place as where
from colonnade.workload import RELU, Binary, evaluate, without_function

PORTABLE = isa("portable")
GOOD = "f32_add_1v__portable"
BODY = f"(void)t; if (a) {GOOD}(a, t, n);"
# kernels that do something wrong, each in its own way
BAD = {
    "bad_nothing": "(void)a; (void)t; (void)n;",
    "bad_value": f"{GOOD}(a, t, n); const cn_binary *b = a; ((float *)(b->arena + b->out[0]))[0] += 0.01f;",
    "bad_halo": f"{GOOD}(a, t, n); const cn_binary *b = a; ((float *)(b->arena + b->out[0]))[b->plane - 1] = 1e-9f;",
    "bad_input": f"{GOOD}(a, t, n); const cn_binary *b = a; ((float *)(b->arena + b->a[0]))[0] += 1;",
    "bad_crash": f"{GOOD}(a, t, n); const cn_binary *b = a; *(volatile char *)(b->arena - 1) = 0;",
    "bad_hang": "(void)a; (void)t; (void)n; for (volatile int i = 1; i;) {}",
}


# kernels that are not alone what they are in a network: they notice other arguments than those of their last call
MOODY = "static const void *last; const int elsewhere = last && last != a; last = a;"
BAD_IN_COMPANY = {
    "moody_slow": f"{MOODY} usleep(elsewhere ? 30000 : 10000); {GOOD}(a, t, n);",
    "moody_crash": f"{MOODY} usleep(10000); if (elsewhere) abort(); {GOOD}(a, t, n);",
}


@dataclass
class Model:
    steps: tuple[Step, ...]


def sample(name: str = "add", size: int = 9) -> Step:
    """A residual add on small planes."""
    layout = Planes(1, size, size, size + 1, size + 1, lead=size + 2)
    shape = (1, 3, size, size)
    bytes_ = layout.buffer_bytes(3)
    a, b, y = (place(n, shape, layout, i * bytes_) for i, n in enumerate("aby"))
    return Step(name, Binary("add", shape, activation=RELU), (a, b), y)


def library(sleep_ms: int = 0) -> dict[str, str]:
    """The add kernel, the bad ones, and `slow_0` … `slow_9`, right ones that sleep first."""
    files = render.library(PORTABLE, [registry.variants(PORTABLE)[GOOD]])
    # each says in the file $TRACE that it ran
    trace = 'if (!t && getenv("TRACE")) {{ FILE *f = fopen(getenv("TRACE"), "a"); fputs("{0}\\n", f); fclose(f); }}'
    bodies = (
        BAD
        | BAD_IN_COMPANY
        | {
            f"slow_{i}": f"{trace.format(f'slow_{i}')} if (!t) usleep({(sleep_ms + i) * 1000}); {BODY}"
            for i in range(10)
        }
    )
    code = "".join(
        f"static void {n}(const void *a, unsigned t, unsigned n) {{ {body} }}\n" for n, body in bodies.items()
    )
    source = files["kernels_portable.c"]
    source = source.replace("typedef struct { const char *symbol", f"{code}typedef struct {{ const char *symbol")
    source = source.replace("    {0, 0},", "".join(f'    {{"{n}", {n}}},\n' for n in bodies) + "    {0, 0},")
    return {**files, "kernels_portable.c": f"#include <stdio.h>\n#include <stdlib.h>\n#include <unistd.h>\n{source}"}


def test_a_record_knows_the_kernels_that_a_kernel_calls() -> None:
    """What was measured of a transform counts no longer where the product behind it is another one."""
    plain, free = isa("avx512"), replace(isa("avx512"), broadcasts=True)
    product, alike = "f32_pairconv_8x2v__avx512", "f32_vertical4_8x2v__avx512"
    for symbol in (product, "f32_vertical4p_8x2v__avx512"):
        assert source_digest("conv2d", symbol, plain) != source_digest("conv2d", symbol, free)
    assert source_digest("conv2d", alike, plain) == source_digest("conv2d", alike, free)


def bind(step: registry.Operands, candidate: Candidate) -> tuple[registry.Call, ...]:
    """The real binding under the candidate's name."""
    return tuple(replace(c, kernel=candidate.kernel) for c in registry.bind(step, Candidate(GOOD)))


def tuner(path: Path, kernels: list[str], threads: int = 1, sleep_ms: int = 0, compiler: str | None = None) -> Tuner:
    harness = Harness(Local(), PORTABLE, threads, Toolchain(), library=library(sleep_ms))
    spot = where(harness.machine, PORTABLE, threads, harness.toolchain)
    spot = replace(spot, compiler=compiler or spot.compiler)
    listed = [Candidate(name, rank=10 + rank) for rank, name in enumerate(kernels)]
    chooser = Chooser(Database(path), spot, PORTABLE, lambda *_: listed, lambda op, symbol, isa: f"digest of {symbol}")
    return Tuner(harness, chooser, bind, limit_s=1)


def rows(path: Path) -> list[tuple[str, str, str]]:
    with sqlite3.connect(path) as connection:
        return list(connection.execute("select kernel, outcome, reps from measurement order by id"))


@pytest.mark.parametrize("threads", [1, 2])
def test_failures_are_recorded_and_never_chosen(tmp_path: Path, threads: int) -> None:
    path = tmp_path / "t.db"
    subject = tuner(path, [*BAD, GOOD], threads)
    summary = subject.tune(Model((sample(),)), 60)
    outcomes = {kernel: outcome for kernel, outcome, _ in rows(path)}
    assert outcomes == {
        "bad_nothing": "wrong", "bad_value": "wrong", "bad_halo": "wrong", "bad_input": "wrong",
        "bad_crash": "crash", "bad_hang": "hang", GOOD: "ok",
    }  # fmt: skip
    assert len(summary.failures) == 6 and summary.left == 0
    choice = subject.chooser.choose(Model((sample(),)))
    assert choice.candidates[0].kernel == GOOD and choice.untuned == 0


def test_nothing_right_leaves_the_step_untuned(tmp_path: Path) -> None:
    subject = tuner(tmp_path / "t.db", ["bad_crash", "bad_value"])
    assert subject.tune(Model((sample(),)), 60).left == 0
    assert subject.chooser.choose(Model((sample(),))).untuned == 1


def test_the_static_ranking_skips_what_is_known_to_fail(tmp_path: Path) -> None:
    subject = tuner(tmp_path / "t.db", ["bad_value", GOOD])
    step = sample()
    spot = subject.chooser.place
    source = judged("digest of bad_value", "wrong")
    subject.chooser.database.add(step.key(), spot, Candidate("bad_value"), source, 0, Measurement("wrong"))
    choice = subject.chooser.choose(Model((step,)))
    assert (choice.candidates[0].kernel, choice.untuned) == (GOOD, 1)


@pytest.mark.parametrize("function", ["Sqrt", "Log", "Reciprocal", "Tan", "Acosh", "Sigmoid", "Floor"])
def test_functions_that_are_not_everywhere_smooth_or_defined(tmp_path: Path, function: str) -> None:
    """Their kernels are right: where the definition has no number, or rounding decides, nothing is compared."""
    made = Builder()
    x = made.conv(made.input("x", (1, 3, 9, 9)), 3, 8, 3, pads=(1, 1, 1, 1))
    steps = imported(made.build(made.op(function, x))).arrange()
    summary = tuning(steps, Local(), PORTABLE, 1, 2.0, tmp_path / "db")
    assert summary.measured > 3 and not summary.failures


def test_what_a_function_hides_is_not_compared_and_all_else_is() -> None:
    """Square roots: nothing below zero and right above it, all others by what is tolerated."""
    made = Builder()
    x = made.conv(made.input("x", (1, 3, 9, 9)), 3, 8, 3, pads=(1, 1, 1, 1))
    (step,) = (s for s in imported(made.build(made.op("Sqrt", x))).arrange().plan().steps if s.inputs and s.output)
    inputs = [made.rng.standard_normal((1, 3, 9, 9)).astype(np.float32)]
    sums = evaluate(without_function(step.workload), inputs, step.constants)
    wanted, tolerance = expected(step, inputs, 4)
    near = np.abs(sums).max() * 1e-2
    assert np.isinf(wanted[sums < 0]).all() and np.isinf(wanted[(sums >= 0) & (sums < near / 1e4)]).all()
    np.testing.assert_array_equal(wanted[sums > near], np.sqrt(sums[sums > near].astype(np.float64)).astype(np.float32))
    assert 0 < tolerance < 1e-3 * np.sqrt(sums.max())


def test_who_was_found_wrong_by_another_check_is_looked_at_again(tmp_path: Path) -> None:
    subject = tuner(tmp_path / "t.db", [GOOD])
    step, spot = sample(), subject.chooser.place
    subject.chooser.database.add(step.key(), spot, Candidate(GOOD), f"digest of {GOOD}", 0, Measurement("wrong"))
    assert subject.tune(Model((step,)), 60).measured and subject.chooser.choose(Model((step,))).untuned == 0


def test_a_second_run_measures_nothing_and_the_fastest_wins(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    model = Model((sample("first"), sample("again"), sample("other", 12)))
    subject = tuner(path, ["slow_3", "slow_1", GOOD])
    summary = subject.tune(model, 60)
    assert (summary.workloads, summary.known, summary.left) == (2, 0, 0)
    assert all(c.kernel == GOOD for c in subject.chooser.choose(model).candidates)
    before = rows(path)
    again = tuner(path, ["slow_3", "slow_1", GOOD]).tune(model, 60)
    assert (again.known, again.measured) == (2, 0) and rows(path) == before
    assert all(len(json.loads(reps)) >= 3 for kernel, _, reps in before if kernel == GOOD)


def test_records_of_other_places_do_not_count(tmp_path: Path) -> None:
    path, model = tmp_path / "t.db", Model((sample(),))
    tuner(path, [GOOD, "slow_0"]).tune(model, 60)
    assert tuner(path, [GOOD, "slow_0"], threads=2).chooser.choose(model).untuned == 1
    assert tuner(path, [GOOD, "slow_0"], compiler="cc 1.0").chooser.choose(model).untuned == 1
    other = tuner(path, [GOOD, "slow_0"])
    other.chooser.place = replace(other.chooser.place, machine="another")
    assert other.chooser.choose(model).untuned == 1
    assert tuner(path, [GOOD, "slow_0"]).chooser.choose(model).untuned == 0


def test_a_changed_kernel_is_measured_again(tmp_path: Path) -> None:
    path, model = tmp_path / "t.db", Model((sample(),))
    tuner(path, [GOOD, "slow_0"]).tune(model, 60)
    changed = tuner(path, [GOOD, "slow_0"])
    changed.chooser._source = lambda op, symbol, isa: f"newer {symbol}"
    assert changed.chooser.choose(model).untuned == 1
    assert changed.tune(model, 60).measured > 0


def test_a_spent_budget_says_what_is_left(tmp_path: Path) -> None:
    subject = tuner(tmp_path / "t.db", [GOOD, "slow_0"])
    summary = subject.tune(Model((sample(), sample("other", 12))), 0.0)
    assert (summary.measured, summary.left) == (0, 2)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_being_stopped_keeps_all_but_the_candidate_in_flight(tmp_path: Path, how: signal.Signals) -> None:
    path, trace = tmp_path / "t.db", tmp_path / "trace"
    process = start(path, 60, trace)
    wait_for(path, 2, process)
    process.send_signal(how)
    process.communicate(timeout=20)
    kept = rows(path)
    assert process.returncode != 0 and len(kept) >= 2 and {outcome for _, outcome, _ in kept} == {"ok"}
    # the measuring program of a killed tuner ends at the next word that it has for it
    time.sleep(1.5 if how == signal.SIGKILL else 0)
    ran = trace.read_text().split()
    time.sleep(0.3)
    assert trace.read_text().split() == ran, "something still measures for nobody"
    assert len(set(ran) - {kernel for kernel, _, _ in kept}) <= 1
    subject = tuner(path, [f"slow_{i}" for i in range(10)], sleep_ms=0)
    subject.tune(Model((sample(),)), 60)
    first_stage = rows(path)[: len({kernel for kernel, _, _ in rows(path)})]
    assert first_stage[: len(kept)] == kept and len({kernel for kernel, _, _ in first_stage}) == 10


def test_a_new_database_that_another_is_writing_is_waited_for(tmp_path: Path) -> None:
    """Who opens it at the same time holds it for a moment, and SQLite waits for nobody when the mode changes."""
    other = sqlite3.connect(tmp_path / "t.db", isolation_level=None, check_same_thread=False)
    other.execute("create table made (x)")
    other.execute("begin immediate")
    later = threading.Timer(0.3, other.rollback)
    later.start()
    assert Database(tmp_path / "t.db").records("", Place("", "", "", 1)) == []
    later.join()


def test_two_tuners_share_a_database(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    processes = [start(path, 1), start(path, 1)]
    for process in processes:
        _, errors = process.communicate(timeout=90)
        assert process.returncode == 0, errors
    with sqlite3.connect(path) as connection:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
    assert tuner(path, [f"slow_{i}" for i in range(10)]).chooser.choose(Model((sample(),))).untuned == 0


@pytest.mark.parametrize("how", ["another program's", "damaged", "no times"])
def test_a_database_that_cannot_be_read_is_named(tmp_path: Path, how: str) -> None:
    """Whatever is wrong with it shows when it is read, not when it is opened."""
    path, spot = tmp_path / "t.db", Place("m", "c", "i", 1)
    if how == "another program's":
        with sqlite3.connect(path) as other:
            other.executescript("create table theirs (x); pragma user_version = 1;")
    else:
        known = Database(path)
        for number in range(300):
            known.add(f"w{number % 3}", spot, Candidate("k"), "s" * 200, 0, Measurement("ok", "", (1,)))
        known.close()
        if how == "damaged":
            whole = path.read_bytes()
            path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
        else:
            with sqlite3.connect(path) as other:
                other.execute("update measurement set reps = 'many'")
    with pytest.raises(UserError, match=r"t\.db: cannot be used as tuning database .*; choose another --db"):
        Database(path).records("w0", spot)
    if how == "another program's":
        with pytest.raises(UserError, match="choose another --db"):
            Database(path).count()


def test_records_that_may_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder on a read-only disk takes no files of SQLite's beside the database."""
    path, spot = tmp_path / "t 1%.db", Place("portable", "cc", "m", 1)
    known = Database(path)
    known.add("w", spot, Candidate("k"), "s", 0, Measurement("ok", "", (1,)))
    known.close()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("colonnade.tune.database.os.access", lambda *_: False)
    sealed = Database(path)
    assert [record.candidate for record in sealed.records("w", spot)] == [Candidate("k").key()]
    with pytest.raises(UserError, match=r"cannot record a measurement .*readonly.*choose another --db"):
        sealed.add("w", spot, Candidate("k"), "s", 0, Measurement("ok", "", (1,)))
    sealed.close()
    assert sorted(tmp_path.iterdir()) == before


def test_a_database_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    with sqlite3.connect(path) as connection:
        connection.execute("pragma user_version = 99")
    with pytest.raises(UserError, match="format 99"):
        Database(path)
    (tmp_path / "junk.db").write_bytes(b"not a database at all, but long enough to be one" * 20)
    with pytest.raises(UserError, match=r"junk\.db"):
        Database(tmp_path / "junk.db")


def test_the_whole_output_is_expected_and_inputs_are_left_alone() -> None:
    step = sample()
    prepared = problem(step)
    covered = sum(len(e.data) for e in prepared.expected)
    assert step.output is not None
    assert covered == 3 * step.output.planes.plane * 4 + step.output.lead_bytes
    values = np.concatenate([np.frombuffer(e.data, np.float32) for e in prepared.expected])
    assert np.isfinite(values).sum() == 3 * 9 * 9  # all the others must be exactly zero


def test_in_place_steps_get_a_place_of_their_own() -> None:
    step = sample()
    prepared = problem(replace(step, output=replace(step.inputs[0], name="y")))
    moved = prepared.step
    assert moved.output is not None and moved.output.lead_offset >= moved.inputs[1].offsets[-1]


def test_a_binding_that_raises_is_an_error_record(tmp_path: Path) -> None:
    def broken(step: registry.Operands, candidate: Candidate) -> tuple[registry.Call, ...]:
        if candidate.kernel != GOOD:
            raise ValueError("no such tile")
        return bind(step, candidate)

    subject = tuner(tmp_path / "t.db", ["slow_0", GOOD])
    subject.bind = broken
    subject.tune(Model((sample(),)), 60)
    assert {k: o for k, o, _ in rows(tmp_path / "t.db")} == {"slow_0": "error", GOOD: "ok"}


def test_a_crash_costs_only_the_candidate_in_flight() -> None:
    harness = Harness(Local(), PORTABLE, 1, Toolchain(), library=library())
    candidates = [Candidate(k) for k in ("bad_crash", GOOD, "bad_hang", "slow_0")]
    runs = [Run(i, True, 1, 2, 0, 1) for i in range(4)] + [Run(i, False, 1, 2, 0, 1) for i in range(4)]
    seen: list[tuple[str, str]] = []
    harness.run(problem(sample()), candidates, runs, lambda i, m: seen.append((candidates[i].kernel, m.outcome)), bind)
    assert seen == [
        ("bad_crash", "crash"), (GOOD, "ok"), ("bad_hang", "hang"), ("slow_0", "ok"), (GOOD, "ok"), ("slow_0", "ok"),
    ]  # fmt: skip


def records(stage: int, **ns: int) -> list[Record]:
    return [Record(k, "s", stage, Measurement("ok", "", (v,) * 3)) for k, v in ns.items()]


def test_search_opens_the_best_groups_and_remeasures_the_leaders() -> None:
    a, b = Candidate("a"), Candidate("b")
    a8, b8 = Candidate("a", {"prefetch": 8}), Candidate("b", {"prefetch": 8})
    everything = [a, a8, b, b8]
    batch = search.next_batch(everything, [])
    assert batch == search.Batch(0, (a, b))
    known = records(0, a=150, b=200)
    batch = search.next_batch(everything, known)
    assert batch == search.Batch(0, (a, b)), "both are visited once more, for the first time may have been disturbed"
    known += records(0, a=100, b=250)
    batch = search.next_batch(everything, known)
    assert batch == search.Batch(1, (a8,)), "b's head is too slow for its group to be opened"
    known += [Record(a8.key(), "s", 1, Measurement("ok", "", (101, 99, 99)))]
    batch = search.next_batch(everything, known)
    assert (
        batch is not None and batch.stage == search.FINAL and set(c.key() for c in batch.candidates) == {"a", a8.key()}
    )
    known += [*records(search.FINAL, a=90), Record(a8.key(), "s", 2, Measurement("ok", "", (95, 95, 95)))]
    assert search.next_batch(everything, known) is None
    assert search.decide(everything, known) == a, "the last stage overrules the first impression"


def test_static_rank_and_slow_families_save_visits() -> None:
    def heads(name: str, ranks: list[float], **params: int) -> list[Candidate]:
        return [Candidate(f"{name}{i}", {"dense": 0, **params}, rank) for i, rank in enumerate(ranks)]

    direct = heads("d", [10, 11, 12, 13, 14, 26])
    packed = heads("p", [100, 101, 102, 103, 104], feed=1)
    other = heads("w", [1000], winograd=4)
    everything = [*direct, *packed, *other]
    first = search.next_batch(everything, [])
    # a few of each family, however bad the ranking thinks of it, and none far behind its own family's best
    assert first == search.Batch(0, (*direct[:4], *packed[:4], *other))
    known = [Record(c.key(), "s", 0, Measurement("ok", "", (100,))) for c in direct[:4]]
    known += [Record(c.key(), "s", 0, Measurement("ok", "", (400,))) for c in (*packed[:4], *other)]
    second = search.next_batch(everything, known)
    assert second == search.Batch(0, (direct[4],)), "packed was slow: the rest of that family is left out"


SPARSE, DENSE = Candidate("k", {"dense": 0}), Candidate("k", {"dense": 1})


def visits(stage: int, sparse: tuple[int, ...], dense: tuple[int, ...]) -> list[Record]:
    return [
        Record(SPARSE.key(), "s", stage, Measurement("ok", "", sparse)),
        Record(DENSE.key(), "s", stage, Measurement("ok", "", dense)),
    ]


def test_sparse_and_dense_meet_in_a_duel() -> None:
    known = visits(0, (100,), (300,)) + visits(0, (100,), (300,))[:1]
    batch = search.next_batch([SPARSE, DENSE], known)
    assert batch == search.Batch(search.DUEL, (SPARSE, DENSE)), "however slow the dense self looked"
    assert search.next_batch([SPARSE, DENSE], known + visits(search.DUEL, (100,), (300,))) is None


@pytest.mark.parametrize(
    ("before", "sparse", "dense", "winner"),
    [
        (0, (102, 102, 102), (100, 100, 100), SPARSE),  # within the margin
        (0, (104, 104, 104), (100, 100, 100), DENSE),  # beyond it
        (0, (90, 104, 130), (80, 100, 120), SPARSE),  # beyond it, but not beyond the spread
        (0, (200, 200, 200), (100, 100, 100), DENSE),
        (1, (100, 100, 100), (101, 101, 101), SPARSE),  # dense had only been lucky
        (1, (101, 101, 101), (100, 100, 100), DENSE),
    ],
)
def test_a_pruned_layer_is_never_slower_than_its_dense_self(
    before: int, sparse: tuple[int, ...], dense: tuple[int, ...], winner: Candidate
) -> None:
    first = [(100,), (101,)] if not before else [(101,), (100,)]
    known = [*visits(0, *first), *visits(search.FINAL, *first), *visits(search.DUEL, sparse, dense)]
    assert search.decide([SPARSE, DENSE], known) == winner
    fought = search.duel([SPARSE, DENSE], known)
    assert fought is not None and (fought.sparse_ns, fought.dense_ns) == (sparse[1], dense[1])


def test_a_duellist_that_fails_makes_way_for_the_next() -> None:
    other = Candidate("j", {"dense": 1})
    known = 2 * [*visits(0, (100,), (110,)), Record(other.key(), "s", 0, Measurement("ok", "", (120,)))]
    known += [*visits(search.FINAL, (100,), (110,)), Record(DENSE.key(), "s", search.DUEL, Measurement("crash"))]
    batch = search.next_batch([SPARSE, DENSE, other], known)
    assert batch == search.Batch(search.DUEL, (SPARSE, other))


def test_the_tuner_fights_the_duel_and_the_choice_tells(tmp_path: Path) -> None:
    subject = tuner(tmp_path / "t.db", [])
    listed = [Candidate("slow_9", {"dense": 0}, 0), Candidate(GOOD, {"dense": 1}, 1)]
    subject.chooser._candidates = lambda *_: listed
    subject.tune(Model((sample(),)), 60)
    choices = subject.chooser.choose(Model((sample(), sample("again"))))
    assert [c.kernel for c in choices.candidates] == [GOOD, GOOD] and choices.dense_instead == 2
    (fought, _) = choices.duels
    assert fought is not None and fought.dense_wins and fought.sparse_ns > 9e6 > fought.dense_ns
    assert choices.manifest()["duels"][0] == {"sparse_ns": fought.sparse_ns, "dense_ns": fought.dense_ns}
    with sqlite3.connect(tmp_path / "t.db") as connection:
        query = "select kernel, count(*) from measurement where stage = 3 group by kernel"
        turns = dict(connection.execute(query))
    assert turns[GOOD] == turns["slow_9"] > 1, "measured in turns"


def start(path: Path, sleep_ms: int, trace: Path | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, str(path), str(sleep_ms)]
    environment = dict(os.environ, **({"TRACE": str(trace)} if trace else {}))
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def wait_for(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if path.exists() and len(rows(path)) >= count:
                return
        except sqlite3.OperationalError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"no {count} records: {process.stderr.read() if process.stderr else ''}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it would be ignored
    tuner(Path(sys.argv[1]), [f"slow_{i}" for i in range(10)], sleep_ms=int(sys.argv[2])).tune(Model((sample(),)), 60)


def network(*steps: Step) -> Plan:
    return Plan("network", (), (), steps, (), 1 << 20)


def stages(path: Path, stage: int) -> dict[str, int]:
    """Repetitions by kernel."""
    found: dict[str, int] = {}
    with sqlite3.connect(path) as connection:
        for kernel, reps in connection.execute("select kernel, reps from measurement where stage = ?", (stage,)):
            found[kernel] = found.get(kernel, 0) + len(json.loads(reps))
    return found


@pytest.mark.parametrize("threads", [1, 2])
def test_the_network_overrules_what_a_layer_is_by_itself(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "NEAR", 10.0)  # on a busy machine three sleeps of one length differ
    path, plan = tmp_path / "t.db", network(sample("first"), sample("again"))
    subject = tuner(path, ["moody_slow", "slow_0"], threads, sleep_ms=10)
    summary = subject.tune(plan, 120)
    assert summary.walks > 0 and (summary.left, summary.unsettled, summary.failures) == (0, 0, [])
    assert {c.kernel for c in subject.chooser.choose(plan).candidates} == {"slow_0"}
    # what is settled is not measured again, nor does a model without a network of its own forget it
    before = stages(path, NETWORK)
    assert set(before) == {"moody_slow", "slow_0"}
    again = subject.tune(plan, 120)
    assert (again.walks, again.measured, stages(path, NETWORK)) == (0, 0, before)
    assert subject.chooser.choose(Model((sample(),))).candidates[0].kernel == "slow_0"


def test_walks_under_a_fallen_peak_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a machine that never calms stop the search: from some point on all of them do."""
    monkeypatch.setattr(meeting, "NEAR", 10.0)
    made: list[int] = []
    walk = Harness.walk

    def counted(self: Harness, *arguments: Any) -> list[list[int]]:
        found = walk(self, *arguments)
        made.append(len(found) - walks.WARM)
        return found

    monkeypatch.setattr(Harness, "walk", counted)
    peaks = iter([100.0, 50, *[100.0] * 99])
    monkeypatch.setattr(Harness, "peak", lambda self: Peak(next(peaks)))
    summary = tuner(tmp_path / "t.db", ["slow_1", "slow_0"], sleep_ms=5).tune(network(sample("first")), 60)
    assert (summary.unsettled, summary.failures) == (0, [])
    assert len(made) > 2 and summary.walks == sum(made[2:]) > 0  # the fall is seen before the second one, too
    made.clear()
    rising = iter(range(100, 10**6, 100))  # every peak puts the one before in the shade
    monkeypatch.setattr(Harness, "peak", lambda self: Peak(next(rising)))
    summary = tuner(tmp_path / "u.db", ["slow_1", "slow_0"], sleep_ms=5).tune(network(sample("first")), 60)
    assert (summary.unsettled, summary.failures) == (0, []) and 0 < summary.walks < sum(made)


def test_a_crash_in_the_network_leaves_what_was_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "NEAR", 10.0)
    path, plan = tmp_path / "t.db", network(sample("first"), sample("again"))
    subject = tuner(path, ["moody_crash", "slow_0"], sleep_ms=10)
    summary = subject.tune(plan, 60)
    assert summary.walks == 0 and "walk through the network failed" in summary.failures[0]
    assert subject.chooser.choose(plan).untuned == 0 and not stages(path, NETWORK)


def test_heats_shorten_the_list_and_resume(tmp_path: Path) -> None:
    field = [Candidate(name) for name in ("quick", "near", "far")]
    records: list[Record] = []

    def walk(name: str, ns: int, count: int) -> None:
        records.append(Record(name, "", NETWORK, Measurement("ok", "", (ns,) * count)))

    first, second, third, fourth = (walks for walks, _ in HEATS)
    assert standing(field, records) == Standing(tuple(field), first, None)
    walk("quick", 1000, first)
    walk("near", 1040, first)
    walk("far", 1300, first - 1)
    assert standing(field, records) == Standing(tuple(field), 1, None)
    walk("far", 1300, 1)
    assert standing(field, records) == Standing(tuple(field[:2]), second - first, field[0])
    # disturbed walks change nothing, however many they are up to three quarters
    walk("quick", 1500, second - first)
    walk("near", 1040, second - first)
    assert second == 3 * first and third > second
    assert standing(field, records) == Standing(tuple(field[:2]), third - second, field[0])
    # a change of places with more walks; whoever fell behind early stays out
    walk("quick", 1100, fourth)
    walk("near", 1040, fourth)
    state = standing(field, records)
    assert (state.running, state.best) == ((), field[1])


def test_siblings_of_the_leader_meet_afterwards(tmp_path: Path) -> None:
    """What the list of rivals had no room for, and by itself was behind, wins inside the network."""

    def record(candidate: Candidate, stage: int, ns: int, count: int) -> Record:
        return Record(candidate.key(), "", stage, Measurement("ok", "", (ns,) * count))

    ways = [Candidate("a", {"fetch": fetch, "split_tiles": split}) for fetch, split in ((0, 0), (0, 1), (1, 0), (1, 1))]
    candidates = [*ways, Candidate("b"), Candidate("c")]
    records = [record(c, 1, ns, 1) for c, ns in zip(candidates, (100, 104, 120, 150, 110, 130), strict=True)]
    field = rivals(candidates, records, 4)
    assert field == (ways[0], *candidates[4:], ways[1]) and siblings(candidates, records, ways[0]) == ()
    enough = HEATS[-1][0]
    records += [record(c, NETWORK, 190 if c is ways[1] else 200, enough) for c in field]
    best = decide(candidates, records)
    assert best == ways[1]
    assert siblings(candidates, records, candidates[4]) == ()  # a kernel has these or not
    late = siblings(candidates, records, best)
    assert late == (best, ways[2])  # the fourth way is too far behind by itself
    records.append(record(ways[2], NETWORK, 150, HEATS[0][0] - 1))  # interrupted: that is no answer
    assert decide(candidates, records) == best and siblings(candidates, records, best) == late
    assert standing(late, records).walks == 1
    records.append(record(ways[2], NETWORK, 150, enough))
    assert decide(candidates, records) == ways[2] and siblings(candidates, records, ways[2]) == ()


def test_rivals_are_the_best_prefetch_of_every_way_near_the_best_and_every_kernel_first(tmp_path: Path) -> None:
    def one(kernel: str, block: int, prefetch: int, ns: int) -> tuple[Candidate, Record]:
        candidate = Candidate(kernel, {"strip_block": block, "prefetch": prefetch})
        return candidate, Record(candidate.key(), "", 1, Measurement("ok", "", (ns,)))

    pairs = [one("a", 1, 0, 105), one("a", 1, 8, 100), one("a", 0, 8, 120), one("b", 1, 8, 130), one("c", 1, 8, 140)]
    candidates, records = [c for c, _ in pairs], [r for _, r in pairs]
    assert rivals(candidates, records) == (candidates[1], candidates[3], candidates[2])
    assert rivals(candidates, records, 2) == (candidates[1], candidates[3])
    assert rivals(candidates[:2], records[:2]) == ()  # one way alone has nobody to meet
    assert decide(candidates, records) == candidates[1]
