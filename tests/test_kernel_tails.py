"""The last lanes of a plane, computed with the rows of a tile in the lanes of a vector: every block of every kernel."""

from __future__ import annotations

import ctypes
import re
import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from convolutions import operands
from kernel_harness import need, run

from colonnade.build.toolchain import FLAGS, Toolchain, host
from colonnade.kernels import registry, render
from colonnade.kernels.isa import isa as isa_named
from colonnade.kernels.ops import registers as ops
from colonnade.kernels.ops import strips
from colonnade.kernels.registry import Candidate, bind, candidates
from colonnade.pattern import ColumnPattern
from colonnade.workload import NONE, RELU, RELU6, Activation, Conv2d, Epilogue

ISAS = ("avx512", "avx2", "portable")
TOLERANCE = 2e-5  # of the largest magnitude
CLIPPED = Activation(-0.25, 0.5)


def tailed(found: list[Candidate]) -> list[Candidate]:
    return [c for c in found if c.params.get("tail")]


def pointwise(lanes: int, rows: int, columns: int = 9, **more: object) -> Conv2d:
    """A 1x1 convolution of so many output lanes."""
    return Conv2d(1, columns, rows, 1, lanes, (1, 1), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ISAS)
def test_every_block(name: str) -> None:
    """All (rows, vectors, tail) that are compiled, with a tail shorter than the block as well; the sums have the same
    bits as those of whole vectors."""
    isa = need(name)
    seen = 0
    for mr, nv in ops.shapes(isa):
        for vectors, blocks in enumerate(strips.tails(mr, nv, isa)):
            for index, block in enumerate(blocks):
                shorter = blocks[index - 1] + 1 if index else 1
                for tail in {shorter, block}:
                    conv = pointwise(vectors * isa.lanes + tail, mr, epilogue=Epilogue(bool(tail % 2), CLIPPED))
                    case, inputs = operands(conv, None, seed=tail, extra=tail % 3)
                    params = {"strip_block": 0, "prefetch": 0, "split_tiles": 0, "dense": 1, "feed": 0, "fetch": 1}
                    rows, whole = (Candidate(ops.symbol(mr, nv, isa), {**params, "tail": t}) for t in (1, 0))
                    (call,) = bind(case, rows)
                    if call.fields["lanes"] == vectors * isa.lanes + tail:  # a wider pitch adds none: one row
                        assert call.fields["tail"] == tail
                    found = run(case, rows, isa, inputs, tolerance=TOLERANCE)
                    np.testing.assert_array_equal(found, run(case, whole, isa, inputs, tolerance=TOLERANCE))
                    seen += 1
    assert seen > 50 if name == "avx512" else seen > 20


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("tile", [1, 2, 4, 8, 16])
def test_tiles_groups_and_halos(name: str, tile: int) -> None:
    """Several strips, images and groups, tiles with rows left over, lanes of the tail that are no pixels."""
    isa = need(name)
    rng = np.random.default_rng(tile)
    tried = 0
    for index, width in enumerate(range(5, 5 + isa.lanes)):
        conv = Conv2d(
            1 + index % 3, 2 * (3 + index % 4), 2 * (tile + 3), 6 + index % 5, width, (3, 3), padding=(1, 1, 1, 1),
            groups=1 + index % 2, epilogue=Epilogue(index % 3 == 0, (NONE, RELU, RELU6)[index % 3]),
        )  # fmt: skip
        case, inputs = operands(conv, ColumnPattern(0.6, tile=tile), seed=index, extra=index % 3)
        found = tailed(candidates(case, isa, 2))
        for candidate in {(c.kernel, c.params["dense"], c.params["feed"]): c for c in found}.values():
            if rng.random() < 0.5:
                threads = int(rng.integers(1, 4))
                taken = run(case, candidate, isa, inputs, threads=threads, tolerance=TOLERANCE)
                same = Candidate(candidate.kernel, {**candidate.params, "tail": 0})
                np.testing.assert_array_equal(taken, run(case, same, isa, inputs, threads=1, tolerance=TOLERANCE))
                tried += 1
    assert tried > 5 or tile > 8 or tile < 4


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("feed", [0, 1])
def test_no_number_stays_none(name: str, feed: int) -> None:
    isa = need(name)
    conv = Conv2d(1, 6, 8, 7, 7, (1, 1), epilogue=Epilogue(False, RELU))
    case, (x,) = operands(conv, None, seed=1)
    x[0, 2, 6, 6] = np.nan
    candidate = next(c for c in tailed(candidates(case, isa, 1)) if c.params["feed"] == feed)
    with np.errstate(invalid="ignore"):
        found = run(case, candidate, isa, [x], tolerance=TOLERANCE)
    assert np.isnan(found[0, :, 6, 6]).all() and np.isnan(found).sum() == 8


@pytest.mark.parametrize("name", ISAS)
def test_vectors_are_shared_out_evenly(name: str) -> None:
    isa = isa_named(name)
    assert strips.whole(13 * isa.lanes, 3, isa).widths == [3, 3, 3, 2, 2]
    for lanes in range(1, 30 * isa.lanes):
        for mr, nv in ops.shapes(isa):
            cut = strips.tailed(lanes, mr, nv, isa)
            for way in filter(None, (cut, strips.whole(lanes, nv, isa))):
                assert way.vectors * isa.lanes + way.tail >= lanes
                assert sum(way.widths) == way.vectors and max(way.widths) <= nv
            if cut is not None:
                assert cut.vectors * isa.lanes + cut.tail == lanes
                assert cut.tail <= cut.done in strips.tails(mr, nv, isa)[cut.widths[-1]]


def test_seven_by_seven_is_ranked_by_its_pixels() -> None:
    """49 lanes in blocks of 3 vectors and one lane come before 4 vectors, and the model of cost sees it."""
    isa = isa_named("avx512")
    case, _ = operands(Conv2d(1, 64, 64, 7, 7, (1, 1)), ColumnPattern(0.75, tile=8), seed=0)
    best = candidates(case, isa, 1)[0]
    assert best.params["tail"] and best.kernel == "f32_spconv_8x3v__avx512"
    (call,) = bind(case, best)
    assert (call.fields["lanes"], call.fields["tail"], call.fields["strips"]) == (49, 1, 1)


FUNCTION = re.compile(r"^(f32_(?:sp|pair)conv_\w+):[^\n]*\n(.*?)^\.Lfunc_end", re.MULTILINE | re.DOTALL)
LOOP = re.compile(r"^(\.LBB\w+):(?:(?!^\.LBB).)*?\bj\w+\s+\1$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["avx512", "avx2"])
def test_inner_loops_keep_their_sums_in_registers(name: str, tmp_path: Path) -> None:
    """Read in assembly: no multiply-add loop of the convolution touches the stack."""
    isa = isa_named(name)
    files = render.library(isa, [v for v in registry.variants(isa).values() if v.body == "spconv.c.in"])
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    tool = Toolchain()
    source = f"kernels_{name}.c"
    flags = [*tool.target("program", "x86_64"), *FLAGS, *tool.features(source, "x86_64")]
    command = [*tool.command, *flags, "-S", source, "-o", "kernels.s"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and source not in done.stderr, done.stderr  # nor any warning
    loops, spilling = 0, []
    for function in FUNCTION.finditer((tmp_path / "kernels.s").read_text()):
        for loop in LOOP.finditer(function[2]):
            if "vfmadd" in loop[0]:
                loops += 1
                if re.search(r"\(%rsp|\d\(%rbp\)", loop[0]):
                    spilling.append(function[1])
    assert loops > 50 and not spilling


PLACES = """
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#define VEC_INLINE static inline
#define VEC_NOINLINE __attribute__((unused))
typedef struct {{
    const char *source;
    char *arena;
    size_t in_panels, add_panels, out_panels, tile_count, tail;
}} cn_conv;
{strip}
__attribute__((visibility("default"))) void place(const size_t *given, size_t *found);
void place(const size_t *given, size_t *found)
{{
    const cn_conv c = {{.tile_count = given[0], .tail = given[1]}};
    const cn_place at = cn_place_of(&c, given[2], given[3], given[4], given[5], given[6]);
    found[0] = at.strip, found[1] = at.tile;
}}
"""


def test_threads_have_as_much_to_do(tmp_path: Path) -> None:
    """Strips one after the other: each thread begins where the one before ends, and no part is larger than an even one
    by more than a tile of a strip."""
    source = PLACES.format(strip=render._environment().get_template("strip.h.in").render(render.SINGLE))
    place = ctypes.CDLL(str(Toolchain().compile({"place.c": source.encode()}, "shared", host()))).place
    found = (ctypes.c_size_t * 2)()
    for lanes, nv, tiles, threads in product((1, 7, 16, 49, 196, 3136), (1, 2, 6), (1, 5, 64), (1, 2, 3, 4, 7)):
        for cut in (strips.whole(lanes, nv, isa_named("avx512")), strips.tailed(lanes, 8, nv, isa_named("avx512"))):
            if cut is None:
                continue
            weights = [8 * width for width in cut.widths]
            weights[-1] += cut.tail
            share, more = divmod(cut.vectors, cut.count)
            before = []
            for thread in range(threads + 1):
                place((ctypes.c_size_t * 7)(tiles, cut.tail, cut.count, share, more, thread, threads), found)
                at, tile = found
                assert (at, tile) == (cut.count, 0) if thread == threads else at < cut.count and tile < tiles
                before.append(sum(weights[:at]) + (weights[at] * tile / tiles if tile else 0))
            parts = np.diff(before)
            assert before[0] == 0 and before[-1] == sum(weights) and (parts >= 0).all()
            assert parts.max() <= sum(weights) / threads + max(weights) / tiles + 1
