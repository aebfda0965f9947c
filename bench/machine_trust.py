"""How far the machine models are from published measurements: predicted, published, error, case by case.

    python bench/machine_trust.py [--markdown] [--models x60,c908,x100]

Bytes a cycle of memory loops as rvv-bench publishes them, and the share of the multiply-add peak that a GEMM
micro-kernel reaches from L1. Rows marked `fit` were used to choose numbers of the model; the others were not. Prints
the table of docs/machine-models.md: run it again after every change of a model, and put the new table there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from colonnade.build.toolchain import Toolchain
from colonnade.errors import run_script
from colonnade.machine import Instrument, read

# model, loop (bench/machine_loops.c), bytes, published bytes a cycle, was it fitted?
# rvv-bench results: memcpy (copy, bytes), memset (fill), strlen (length: rvv, plain: rvv_page_aligned, count: scalar)
PUBLISHED = (
    ("x60", "copy1", 12000, 3.95, True),
    ("x60", "copy1", 100000, 3.17, True),
    ("x60", "copy2", 12000, 4.56, True),
    ("x60", "copy2", 100000, 4.17, True),
    ("x60", "copy4", 12000, 5.09, True),
    ("x60", "copy4", 100000, 4.29, True),
    ("x60", "copy8", 12000, 5.16, True),
    ("x60", "copy8", 100000, 3.84, True),
    ("x60", "fill1", 12000, 5.25, True),
    ("x60", "fill1", 100000, 5.28, True),
    ("x60", "fill2", 12000, 10.27, True),
    ("x60", "fill2", 100000, 9.44, True),
    ("x60", "fill4", 12000, 12.22, True),
    ("x60", "fill4", 100000, 10.11, True),
    ("x60", "fill8", 12000, 13.0, True),
    ("x60", "fill8", 100000, 9.8, True),
    ("x60", "length1", 12000, 1.24, True),
    ("x60", "length2", 12000, 2.12, False),
    ("x60", "length4", 12000, 2.95, False),
    ("x60", "length8", 12000, 4.38, False),
    ("x60", "plain1", 12000, 2.24, True),
    ("x60", "plain8", 12000, 5.46, False),
    ("x60", "bytes1", 12000, 0.33, True),
    ("x60", "count1", 12000, 0.44, False),
    ("c908", "copy1", 12000, 1.89, False),
    ("c908", "copy1", 100000, 1.8, False),
    ("c908", "copy2", 12000, 2.52, False),
    ("c908", "copy2", 100000, 2.41, False),
    ("c908", "copy4", 12000, 2.84, False),
    ("c908", "copy4", 100000, 2.35, False),
    ("c908", "copy8", 12000, 3.06, False),
    ("c908", "copy8", 100000, 2.41, False),
    ("c908", "fill1", 12000, 2.53, False),
    ("c908", "fill1", 100000, 2.63, False),
    ("c908", "fill2", 12000, 4.81, False),
    ("c908", "fill2", 100000, 5.2, False),
    ("c908", "fill4", 12000, 6.18, False),
    ("c908", "fill4", 100000, 6.06, False),
    ("c908", "fill8", 12000, 6.53, False),
    ("c908", "fill8", 100000, 6.63, False),
    ("c908", "length1", 12000, 0.63, False),
    ("c908", "length2", 12000, 1.08, False),
    ("c908", "length4", 12000, 1.67, False),
    ("c908", "length8", 12000, 2.3, False),
    ("c908", "plain1", 12000, 1.32, False),
    ("c908", "plain8", 12000, 3.68, False),
    ("c908", "bytes1", 12000, 0.33, False),
    ("c908", "count1", 12000, 0.44, False),
    ("x100", "copy1", 12000, 5.66, False),
    ("x100", "copy1", 100000, 5.89, True),
    ("x100", "copy2", 12000, 9.68, False),
    ("x100", "copy2", 100000, 7.08, True),
    ("x100", "copy4", 12000, 9.89, False),
    ("x100", "copy4", 100000, 7.83, True),
    ("x100", "copy8", 12000, 7.64, False),
    ("x100", "copy8", 100000, 8.03, True),
    ("x100", "fill1", 12000, 10.31, False),
    ("x100", "fill1", 100000, 9.25, True),
    ("x100", "fill2", 12000, 12.27, False),
    ("x100", "fill2", 100000, 10.04, True),
    ("x100", "fill4", 12000, 13.68, False),
    ("x100", "fill4", 100000, 10.89, True),
    ("x100", "fill8", 12000, 14.44, False),
    ("x100", "fill8", 100000, 11.36, True),
    ("x100", "length1", 12000, 1.06, False),
    ("x100", "length2", 12000, 1.86, False),
    ("x100", "length4", 12000, 3.0, False),
    ("x100", "length8", 12000, 4.34, False),
    ("x100", "plain1", 12000, 2.21, False),
    ("x100", "plain8", 12000, 8.6, False),
    ("x100", "bytes1", 12000, 0.5, False),
    ("x100", "count1", 12000, 0.5, False),
)  # fmt: skip
# share of peak that the best kernel of a published suite reaches on one tile in L1 (f64 micro-kernels of 4x3 to 6x4
# vectors from packed panels; repository "GEMM benchmark suite using MIPPv2", table of the column-row-row layout)
GEMM = (("x60", 59.9), ("x100", 96.4))
SHAPES = ((4, 3), (4, 4), (6, 4))
DEPTH = 128


def gemm(rows: int, vectors: int) -> str:
    """C of one f64 tile: `rows` x `vectors` accumulators over packed panels, unrolled by four, marked twice."""
    pairs = [(r, v) for r in range(rows) for v in range(vectors)]
    zeros = "".join(f"vfloat64m1_t c{r}_{v} = __riscv_vfmv_v_f_f64m1(0, vl);\n" for r, v in pairs)
    loads = "".join(f"vfloat64m1_t x{v} = __riscv_vle64_v_f64m1(b + {v} * vl, vl);\n" for v in range(vectors))
    adds = "".join(f"c{r}_{v} = __riscv_vfmacc_vf_f64m1(c{r}_{v}, a[{r}], x{v}, vl);\n" for r, v in pairs)
    stores = "".join(f"__riscv_vse64_v_f64m1(c + {r * vectors + v} * vl, c{r}_{v}, vl);\n" for r, v in pairs)
    block = f"{{ {loads}{adds} a += {rows}; b += {vectors} * vl; }}\n" * 4
    return f"""#include <riscv_vector.h>
    #define MARK(n) __asm__ volatile("slti x0, x0, " #n ::: "memory")
    static double a[{DEPTH * rows}], b[{DEPTH * vectors * 16}] __attribute__((aligned(64))), c[{rows * vectors * 16}];
    static __attribute__((noinline)) void tile(const double *a, const double *b, double *c, long n, unsigned long vl)
    {{ {zeros} for (; n; n -= 4) {{ {block} }} {stores} }}
    int main(void)
    {{
        unsigned long vl = __riscv_vsetvlmax_e64m1();
        for (long i = 0; i < {DEPTH * vectors * 16}; i++) b[i] = 1;
        for (int r = 0; r < 2; r++) {{ MARK(1); tile(a, b, c, {DEPTH}, vl); MARK(2); }}
        return 0;
    }}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="x60,c908,x100")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    tools = Toolchain()
    source = Path(__file__).with_name("machine_loops.c").read_text()
    loops = tools.compile({"kernels_rvv.c": source}, "program", "riscv64")
    bar = " | " if options.markdown else "  "
    edge = "|" if options.markdown else ""

    def show(*cells: str) -> None:
        line = bar.join(f"{c:>18}" if i > 1 else f"{c:<22}" for i, c in enumerate(cells))
        print(f"{edge} {line} {edge}" if edge else line)

    show("model", "case", "modelled", "published", "error", "")
    if options.markdown:
        print("|---|---|---:|---:|---:|---|")
    errors: dict[bool, list[float]] = {True: [], False: []}
    for key, loop, size, published, fitted in PUBLISHED:
        if key in options.models.split(","):
            report = Instrument(read(key)).run(loops, [loop, str(size), "3"])
            found = size / report.regions[-1]
            error = found / published - 1
            errors[fitted].append(abs(error))
            show(key, f"{loop} {size // 1000} KB", f"{found:.2f} B/cycle", f"{published:.2f}", f"{100 * error:+.0f} %",
                 "fit" if fitted else "")  # fmt: skip
    for key, published in GEMM:
        for rows, vectors in SHAPES if key in options.models.split(",") else ():
            model = read(key)
            program = tools.compile({"kernels_rvv.c": gemm(rows, vectors)}, "program", "riscv64")
            cycles = Instrument(model).run(program).regions[-1]
            share = 100 * rows * vectors * DEPTH / cycles
            show(
                key,
                f"f64 GEMM {rows}x{vectors}v",
                f"{share:.1f} % of peak",
                f"{published} (best)",
                f"{share - published:+.1f} points",
                "",
            )
    for fitted, found in errors.items():
        if found:
            ranked = sorted(found)
            middle, worst = ranked[len(ranked) // 2], ranked[-1]
            print(f"\n{'fitted' if fitted else 'not fitted'}: {len(found)} cases, median error {100 * middle:.0f} %, "
                  f"largest {100 * worst:.0f} %")  # fmt: skip


if __name__ == "__main__":
    run_script(main)
