"""model.c: a Plan and its choices as straight lines of C that a person can read."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from colonnade.codegen.weights import Constants
from colonnade.kernels import registry
from colonnade.kernels.call import Arena, Call, Const, External, Field, Scratch, Shared
from colonnade.kernels.isa import Isa
from colonnade.kernels.registry import Candidate
from colonnade.kernels.structs import Member
from colonnade.layout import LINE, round_up
from colonnade.plan import Plan, Port, Step

PAGE = 4096  # the scratch areas start on a page of their own


@dataclass(frozen=True, eq=False)
class BoundStep:
    """A step with its kernel calls; ``names`` are the C names of their arguments."""

    step: Step
    candidate: Candidate
    calls: tuple[Call, ...]
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Model:
    """Everything model.c says, in order: what codegen made of a plan."""

    plan: Plan
    isa: Isa
    threads: int
    steps: tuple[BoundStep, ...]
    scratch: int  # bytes a thread, for one call at a time
    shared: int  # bytes in front of them, for one step at a time

    @property
    def kernels(self) -> list[str]:
        """Symbols of the kernels used, sorted."""
        return sorted({call.kernel for bound in self.steps for call in bound.calls})


def bind(plan: Plan, choices: Sequence[Candidate], isa: Isa, threads: int) -> Model:
    """Bind every step of ``plan`` to its choice. ``choices`` has one candidate a step, in order."""
    if len(choices) != len(plan.steps):
        raise ValueError(f"{plan.name}: {len(choices)} choices for {len(plan.steps)} steps")
    taken: set[str] = set()
    steps = []
    for step, candidate in zip(plan.steps, choices, strict=True):
        calls = registry.bind(step, candidate)
        base = _identifier(step.name)
        names = tuple(_unique(base if len(calls) == 1 else f"{base}_{i}", taken) for i in range(len(calls)))
        steps.append(BoundStep(step, candidate, calls, names))
    scratch = max((call.scratch for bound in steps for call in bound.calls), default=0)
    shared = max((call.shared for bound in steps for call in bound.calls), default=0)
    return Model(plan, isa, threads, tuple(steps), round_up(scratch, LINE), round_up(shared, LINE))


def description(model: Model) -> dict[str, object]:
    """What ``colonnade_describe`` answers, as JSON values."""
    return {
        "name": model.plan.name,
        "isa": model.isa.name,
        "threads": model.threads,
        "inputs": [_port(p) for p in model.plan.inputs],
        "outputs": [_port(p) for p in model.plan.outputs],
        "steps": [
            {"name": b.step.name, "workload": b.step.workload.key(), "kernels": [c.kernel for c in b.calls]}
            for b in model.steps
        ],
    }


def source(model: Model, constants: Constants) -> str:
    """The text of model.c; its constants are put into ``constants``, which must be complete before ``tail``."""
    return "\n".join([_head(model), _arguments(model), _fill(model, constants), _bind(model), _steps(model)])


def tail(model: Model, weights_bytes: int, checksum: tuple[int, int]) -> str:
    """The end of model.c: ports, description and the table that runtime.c reads."""
    plan = model.plan
    features = "".join(f'"{flag}", ' for flag in model.isa.flags)
    sums = ", ".join(f"0x{value:016x}u" for value in checksum)
    return "\n".join(
        [
            _ports("inputs", plan.inputs),
            _ports("outputs", plan.outputs),
            "static const char *const step_names[] = {",
            *(f"    {_quote(b.step.name)}," for b in model.steps),
            "    NULL,",
            "};",
            "",
            f"static const char *const features[] = {{{features}NULL}};",
            "",
            "static const char json[] =",
            *(f"    {_quote(line)}" for line in _json_lines(description(model))),
            "    ;",
            "",
            "const cn_program_t cn_program = {",
            f"    .name = {_quote(plan.name)},",
            f'    .isa = "{model.isa.name}",',
            "    .features = features,",
            "    .json = json,",
            "    .inputs = inputs,",
            "    .outputs = outputs,",
            f"    .input_count = {len(plan.inputs)},",
            f"    .output_count = {len(plan.outputs)},",
            "    .step_names = step_names,",
            f"    .step_count = {len(model.steps)},",
            f"    .once = {plan.once},",
            f"    .threads = {model.threads},",
            f"    .images = {plan.images},",
            f"    .seam_bytes = {0 if plan.seam is None else plan.seam.nbytes},",
            f"    .weights_bytes = {weights_bytes},",
            f"    .weights_checksum = {{{sums}}},",
            f"    .arena_bytes = {round_up(plan.arena, PAGE)},",
            f"    .shared_bytes = {model.shared},",
            f"    .scratch_bytes = {model.scratch},",
            "    .args_bytes = sizeof(struct args),",
            "    .fill = fill,",
            "    .bind = bind,",
            "    .steps = steps,",
            f"    .rest = {'NULL' if plan.seam is None else 'rest'},",
            "};",
            "",
        ]
    )


def _head(model: Model) -> str:
    plan = model.plan
    macs = sum(b.step.workload.macs for b in model.steps)
    kept = sum(b.step.workload.kept_macs for b in model.steps)
    kernels = "\n".join(f"    cn_kernel *{symbol};" for symbol in model.kernels) or "    char none;"
    ports = "\n".join(
        [f" *   in   {_shape_text(p)}" for p in plan.inputs] + [f" *   out  {_shape_text(p)}" for p in plan.outputs]
    )
    return (
        f"/* {_comment(plan.name)}, compiled for {model.isa.name}. Written by Colonnade; build.sh compiles it again.\n"
        " *\n"
        f"{ports}\n"
        " *\n"
        f" * {len(model.steps)} steps, {kept:,} of {macs:,} multiply-adds kept,\n"
        f" * {plan.arena:,} bytes of activations. All threads walk through `steps` side by side, and wait for\n"
        " * each other after every call.\n"
        " */\n"
        '#include <math.h>\n\n#include "runtime.h"\n\n'
        f"/* what is called; the table stands at the end of kernels_{model.isa.name}.c */\n"
        f"extern const cn_entry cn_kernels_{model.isa.name}[];\n\nstruct kernels {{\n{kernels}\n}};\n"
    )


def _arguments(model: Model) -> str:
    rows = [(call.struct, name) for b in model.steps for call, name in zip(b.calls, b.names, strict=True)]
    width = max((len(struct) for struct, _ in rows), default=0)
    members = "\n".join(f"    {struct:<{width}} {name};" for struct, name in rows)
    return f"/* the arguments of every call */\nstruct args {{\n    struct kernels kernels;\n{members}\n}};\n"


def _fill(model: Model, constants: Constants) -> str:
    lines = [
        "/* Tensors are offsets into the arena, constants are offsets into weights.bin. */",
        "static void fill(void *args, char *arena, char *scratch, const char *weights)",
        "{",
        "    struct args *a = args;",
        "    (void)arena, (void)scratch, (void)weights;",
        "",
        *(f'    a->kernels.{k} = cn_find(cn_kernels_{model.isa.name}, "{k}");' for k in model.kernels),
    ]
    structs = registry.structs()
    for bound in model.steps:
        lines += ["", f"    /* {_comment(bound.step.name)} */"]
        for call, name in zip(bound.calls, bound.names, strict=True):
            lines.append(f"    a->{name} = ({call.struct}){{")
            for member in structs[call.struct].members:
                value = _value(call.fields[member.name], member, constants, model.shared)
                lines.append(f"        .{member.name} = {value},")
            lines.append("    };")
    return "\n".join([*lines, "}", ""])


def _value(field: Field, member: Member, constants: Constants, shared: int) -> str:
    match field:
        case Arena(offset):
            return "arena" if offset == 0 and "char" in member.kind else f"cn_at(arena, {offset})"
        case Const(data):
            return f"cn_at(weights, {constants.add(data)})"
        case Scratch():
            return f"cn_at(scratch, {shared})"
        case Shared(offset):
            return f"cn_at(scratch, {offset})"
        case External() | None:
            return "NULL"
    return _number(field, member)


def _number(value: int | float, member: Member) -> str:
    """A C literal that is exactly the f32 or integer meant."""
    if member.kind != "f32":
        return str(int(value))
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    if math.isnan(value):
        return "NAN"
    text = f"{float(np.float32(value)):.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def _bind(model: Model) -> str:
    seam = [] if model.plan.seam is None else [model.plan.seam]  # the runtime gives it behind the user's arrays
    sources = {port.name: f"inputs[{i}]" for i, port in enumerate((*model.plan.inputs, *seam))}
    sinks = {port.name: f"outputs[{i}]" for i, port in enumerate((*model.plan.outputs, *seam))}
    lines = [
        "/* The user's arrays, at every run. */",
        "static void bind(void *args, const void *const *inputs, void *const *outputs)",
        "{",
        "    struct args *a = args;",
        "    (void)a, (void)inputs, (void)outputs;",
    ]
    for bound in model.steps:
        places = sinks if bound.step.inputs else sources  # a step that reads no tensor reads the user's array
        for call, name in zip(bound.calls, bound.names, strict=True):
            for member, field in call.fields.items():
                if isinstance(field, External):
                    lines.append(f"    a->{name}.{member} = {places[field.name]}; /* {_comment(field.name)} */")
    return "\n".join([*lines, "}", ""])


def _steps(model: Model) -> str:
    once = model.plan.once
    parts = [_function("steps", model, range(once))]
    if model.plan.seam is not None:
        parts.append("/* once, for all images */\n" + _function("rest", model, range(once, len(model.steps))))
    return "\n".join(parts)


def _function(name: str, model: Model, indices: Iterable[int]) -> str:
    lines = [
        f"static void {name}(const void *args, const cn_run *run, unsigned thread, unsigned threads)",
        "{",
        "    const struct args *a = args;",
        "    const struct kernels *k = &a->kernels;",
        "    (void)k, (void)thread, (void)threads;",
    ]
    for index in indices:
        bound = model.steps[index]
        step = bound.step
        title = f"{index} {_comment(step.name)}"
        lines += ["", *_wrap(f"{title}: {_comment(step.workload.key()).replace(',', ', ')}")]
        for i, (call, name) in enumerate(zip(bound.calls, bound.names, strict=True)):
            if i:
                lines.append("    cn_barrier(run->team);")
            lines.append(f"    k->{call.kernel}(&a->{name}, thread, threads);")
        lines.append(f"    cn_done(run, {index}, thread);")
    return "\n".join([*lines, "}", ""])


def _ports(what: str, ports: Sequence[Port]) -> str:
    lines = []
    for i, port in enumerate(ports):
        dims = ", ".join(map(str, port.shape)) or "0"
        lines.append(f"static const int64_t {what[:-1]}_shape_{i}[] = {{{dims}}};")
    lines.append(f"static const colonnade_port {what}[] = {{")
    for i, port in enumerate(ports):
        name = _quote(port.name)
        lines.append(f'    {{{name}, "{port.dtype}", {what[:-1]}_shape_{i}, {len(port.shape)}, {port.nbytes}}},')
    if not ports:
        lines.append("    {0}")
    return "\n".join([*lines, "};", ""])


def _port(port: Port) -> dict[str, object]:
    return {"name": port.name, "shape": list(port.shape), "dtype": port.dtype}


def _json_lines(values: dict[str, object]) -> list[str]:
    """JSON with one line an entry of every list, cut so that the pieces join to the whole."""
    steps = values["steps"]
    assert isinstance(steps, list)
    heads = [f"{json.dumps(key)}: {json.dumps(value)}, " for key, value in values.items() if key != "steps"]
    rows = [json.dumps(row) + (", " if i + 1 < len(steps) else "") for i, row in enumerate(steps)]
    return ["{", *heads, '"steps": [', *rows, "]}"]


def _shape_text(port: Port) -> str:
    return f"{_comment(port.name)}: {port.dtype} {list(port.shape)}"


def _wrap(text: str) -> list[str]:
    parts = textwrap.wrap(text, 108, break_long_words=False, break_on_hyphens=False) or [""]
    lines = [f"    /* {parts[0]}", *(f"     * {part}" for part in parts[1:])]
    lines[-1] += " */"
    return lines


def _comment(text: str) -> str:
    """Text that cannot open or end a comment, nor continue its line."""
    return re.sub(r"[\x00-\x1f\\]", " ", text).replace("*/", "* /").replace("/*", "/ *")


def _quote(text: str) -> str:
    """A C string literal; what is not plain ASCII as octal bytes of UTF-8."""
    plain = set(range(32, 127)) - set(b'"\\?')
    escaped = {ord('"'): '\\"', ord("\\"): "\\\\"}
    return '"' + "".join(chr(b) if b in plain else escaped.get(b, f"\\{b:03o}") for b in text.encode()) + '"'


def _identifier(name: str) -> str:
    words = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "step"
    return f"s_{words}" if words[0].isdigit() or words in _C_WORDS else words


def _unique(name: str, taken: set[str]) -> str:
    number, chosen = 1, name
    while chosen in taken:
        number += 1
        chosen = f"{name}_{number}"
    taken.add(chosen)
    return chosen


_C_WORDS = frozenset(
    (
        *("auto", "break", "case", "char", "const", "continue", "default", "do", "double", "else", "enum", "extern"),
        *("float", "for", "goto", "if", "inline", "int", "long", "register", "restrict", "return", "short", "signed"),
        *("sizeof", "static", "struct", "switch", "typedef", "union", "unsigned", "void", "volatile", "while"),
        *("asm", "typeof", "linux", "unix", "NULL", "INFINITY", "NAN", "kernels"),
    )
)
