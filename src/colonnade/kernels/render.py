"""From registry rows to C: bodies rendered by Jinja2 with line statements, ops.h from the structs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import resources

import jinja2

from colonnade.kernels.isa import Isa
from colonnade.kernels.registry import Variant, structs

# type of an element, what its vectors are called, what names that differ between both end with, elements of a line
SINGLE: dict[str, object] = {"half": False, "T": "float", "V": "vec", "OF": "", "LINE": 16}
HALF: dict[str, object] = {"half": True, "T": "_Float16", "V": "half", "OF": "_half", "LINE": 32}
SOURCES = resources.files("colonnade.kernels") / "c"


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (SOURCES / name).read_text()),
        line_statement_prefix="//$",
        line_comment_prefix="//#",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )


def kernel(variant: Variant, isa: Isa) -> str:
    """C of one kernel, without the headers it needs.

    A body sees its own parameters and ``symbol``, ``isa``; on a fixed-length ISA a strip of ``NV`` vectors is
    ``NV`` registers of type ``vec1_t`` (``regs = NV, L = 1``), on a scalable one a single group of LMUL = NV
    (``regs = 1, L = NV``): bodies loop over ``range(regs)`` and call ``vec{{L}}_*``. Those that also exist for float16
    (their parameter ``half`` says so) write ``{{T}}`` for an element's type, ``{{V}}`` for ``vec``: see ``SINGLE``.
    """
    nv = variant.params.get("NV", 1)
    assert isinstance(nv, int)
    regs, lmul = (1, nv) if isa.scalable else (nv, 1)
    template = _environment().get_template(variant.body)
    known = {"symbol": variant.symbol, "isa": isa.name, "isa_scalable": isa.scalable, "regs": regs, "L": lmul}
    return template.render({**known, **(HALF if variant.params.get("half") else SINGLE), **variant.params})


def ops_header() -> str:
    """ops.h: argument structs of all kernels."""
    declarations = "\n\n".join(s.declaration() for s in structs().values())
    return (
        "/* Argument structs of all kernels. Written by colonnade.kernels.render; pointers are 64 bits wide.\n"
        " * Every kernel has the signature of cn_kernel and does the share of thread `thread` of `threads`. */\n"
        "#ifndef COLONNADE_OPS_H\n#define COLONNADE_OPS_H\n#include <stddef.h>\n#include <stdint.h>\n\n"
        "typedef void cn_kernel(const void *args, unsigned thread, unsigned threads);\n\n"
        f"{declarations}\n\n#endif\n"
    )


def library(isa: Isa, chosen: Iterable[Variant]) -> dict[str, str]:
    """Files of one kernel library: ``kernels_<isa>.c``, its vector header and ops.h.

    It exports ``const cn_entry cn_kernels_<isa>[]``, symbols and functions, closed by a null symbol.
    """
    called = {v.symbol: v for one in chosen for v in (one, *one.needs)}
    ordered = [called[symbol] for symbol in sorted(called)]
    bodies = "\n".join(kernel(v, isa) for v in ordered)
    table = "".join(f'    {{"{v.symbol}", {v.symbol}}},\n' for v in ordered)
    source = (
        f"/* Kernels for {isa.name}, rendered from colonnade's kernel bodies. */\n"
        f'#include "ops.h"\n#include "{isa.header}"\n\n{bodies}\n'
        "typedef struct { const char *symbol; cn_kernel *kernel; } cn_entry;\n"
        f"const cn_entry cn_kernels_{isa.name}[] = {{\n{table}    {{0, 0}},\n}};\n"
    )
    header = (SOURCES / isa.header).read_text()
    return {f"kernels_{isa.name}.c": source, isa.header: header, "ops.h": ops_header()}
