"""The numbers of a core: a TOML file, each number with its source or marked as assumed; as text for the instrument."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from colonnade.errors import UserError

ASSUMED = "assumed"
UNITS = ("alu", "lsu", "fpu", "vec", "vec1", "vmem")  # vec1: the first half of vec; order as in c/model.h
LEVEL = ("size", "ways", "line", "latency", "interval")
CORE = (
    "out_of_order", "width", "window", "retire", "vector_queue", "load_chains", "store_drain", "late",
    "mispredict", "ghz", "vlen", "barrier",
)  # fmt: skip
MISSES = (
    "outstanding", "prefetch_distance", "prefetch_streams", "write_streaming", "tlb_entries", "tlb_miss",
    "tlb2_entries", "tlb2_miss",
)  # fmt: skip


@dataclass(frozen=True)
class Number:
    """One number of a model: its ``value``, where it is from, and the ``span`` it may lie in when assumed."""

    value: float
    source: str
    span: tuple[float, float] | None = None

    @property
    def assumed(self) -> bool:
        """Is there no published source?"""
        return self.source == ASSUMED


@dataclass(frozen=True)
class Cost:
    """One class of instructions: its ``unit``, ``cycles`` it keeps the unit for groups of 1, 2, 4, 8 registers and a
    fraction of one (``per_element``: for each element of a full group), ``latency`` to the first register of the
    result; ``sew64`` multiplies cycles of 64-bit elements; not ``chained``: readers and writers take groups whole."""

    unit: str
    cycles: tuple[float, ...]
    source: str
    latency: Number
    sew64: float = 1.0
    per_element: bool = False
    chained: bool = True


@dataclass(frozen=True)
class Model:
    """A core. ``numbers`` by ``section.name``, ``classes`` by the names in ``c/decode.h``, ``sources`` by key;
    ``extensions`` beside RV64GCV, as /proc/cpuinfo calls them."""

    key: str
    name: str
    chip: str
    numbers: Mapping[str, Number]
    classes: Mapping[str, Cost]
    sources: Mapping[str, str]
    extensions: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> float:
        return self.numbers[name].value

    @property
    def vlen(self) -> int:
        """Bits of a vector register."""
        return int(self["core.vlen"])

    @property
    def ghz(self) -> float:
        """Clock."""
        return self["core.ghz"]

    def assumed(self) -> Iterator[tuple[str, tuple[float, float]]]:
        """Names of the numbers without a published source, and the span each may lie in."""
        for name, number in self.numbers.items():
            if number.assumed and number.span and number.span[0] < number.span[1]:
                yield name, number.span
        for name, cost in self.classes.items():
            if cost.latency.assumed and cost.latency.value > 1:
                yield f"classes.{name}.latency", (cost.latency.value * 0.5, cost.latency.value * 2)

    def vary(self, name: str, value: float) -> Model:
        """The same core with one number replaced (``core.width``, ``l2.latency``, ``classes.vload.latency``)."""
        if name in self.numbers:
            return replace(self, numbers={**self.numbers, name: replace(self.numbers[name], value=value)})
        section, _, rest = name.partition(".")
        word, _, field = rest.rpartition(".")
        if section != "classes" or field != "latency" or word not in self.classes:
            raise UserError(f"model {self.key}: no number {name!r}")
        cost = self.classes[word]
        cost = replace(cost, latency=replace(cost.latency, value=value))
        return replace(self, classes={**self.classes, word: cost})

    def text(self, cores: int = 1) -> str:
        """What the instrument reads, for ``cores`` working at once: see ``c/model.h``.

        A core draws lines at its own intervals. The memory of several gives them what one was seen to move in its
        faster direction, whoever asks first.
        """
        own = {way: self[f"memory.{way}_interval"] for way in ("write", "read")}
        lines = [f"cores {cores}", f"shared_interval {min(own.values()) if cores > 1 else 0:g}"]
        lines += [f"{name} {self[f'core.{name}']:g}" for name in CORE]
        lines.append("units " + " ".join(f"{self['units.' + ('vec' if u == 'vec1' else u)]:g}" for u in UNITS))
        for level in ("l1", "l2"):
            lines.append(f"{level} " + " ".join(f"{self[f'{level}.{field}']:.10g}" for field in LEVEL))
        lines.append(f"memory 0 0 {own['write']:g} {self['memory.latency']:g} {own['read']:g}")
        lines += [f"{name} {self[f'misses.{name}']:g}" for name in MISSES]
        for name, c in self.classes.items():
            cycles = " ".join(f"{x:g}" for x in c.cycles)
            tail = f"{c.sew64:g} {int(c.per_element)} {int(c.chained)}"
            lines.append(f"class {name} {UNITS.index(c.unit)} {c.latency.value:g} {cycles} {tail}")
        return "\n".join(lines) + "\n"


def names() -> list[str]:
    """Keys of the models that come with Colonnade."""
    return sorted(f.name.removesuffix(".toml") for f in _folder().iterdir() if f.name.endswith(".toml"))


def read(key: str) -> Model:
    """The model called ``key``, or that of a TOML file by its path. Raises ``UserError`` for a missing or wrong one."""
    path = Path(key) if key.endswith(".toml") else None
    try:
        text = path.read_text() if path else (_folder() / f"{key}.toml").read_text()
    except OSError as error:
        known = ", ".join(names())
        raise UserError(f"no machine model {key!r}; known: {known}, or the path of a .toml file") from error
    try:
        return parse(key, tomllib.loads(text))
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"machine model {key}: {_reason(error)}; see docs/machine-models.md") from error


def parse(key: str, data: Mapping[str, Any]) -> Model:
    """A model from a parsed file. Raises ``ValueError`` for a missing class, source or unit."""
    sources = {str(k): str(v) for k, v in data["sources"].items()}

    def source(text: str, where: str) -> str:
        if text not in sources and text != ASSUMED:
            raise ValueError(f"{where}: source {text!r} is not listed under [sources]")
        return text

    def number(row: Mapping[str, Any], where: str) -> Number:
        span = row.get("range")
        origin = source(row["from"], where)
        if origin == ASSUMED and span is None:
            raise ValueError(f"{where}: an assumed number needs a range")
        return Number(float(row["value"]), origin, (float(span[0]), float(span[1])) if span else None)

    wanted = {"core": CORE, "units": tuple(u for u in UNITS if u != "vec1"), "l1": LEVEL, "l2": LEVEL,
              "memory": ("latency", "read_interval", "write_interval"), "misses": MISSES}  # fmt: skip
    numbers = {
        f"{section}.{field}": number(data[section][field], f"{section}.{field}")
        for section, fields in wanted.items()
        for field in fields
    }
    classes = {}
    for name in class_names():
        row = data["classes"][name]
        if row["unit"] not in UNITS or len(row["cycles"]) != 5:
            raise ValueError(f"classes.{name}: needs a unit of {', '.join(UNITS)} and five cycles")
        classes[name] = Cost(
            row["unit"],
            tuple(float(x) for x in row["cycles"]),
            source(row["from"], f"classes.{name}"),
            Number(float(row["latency"]), source(row["latency_from"], f"classes.{name}")),
            float(row.get("sew64", 1)),
            row.get("per") == "element",
            bool(row.get("chained", True)),
        )
    more = data.get("extensions", {"names": [], "from": ASSUMED})
    source(more["from"], "extensions")
    return Model(key, data["name"], data["chip"], numbers, classes, sources, frozenset(map(str, more["names"])))


def class_names() -> list[str]:
    """The instruction classes that the instrument knows, in its order."""
    text = (resources.files("colonnade.machine") / "c" / "decode.h").read_text()
    body = re.search(r"#define CLASSES\(X\)(.*?)\n\n", text, re.S)
    assert body
    return re.findall(r"X\((\w+)\)", body[1])


def _folder() -> Any:
    return resources.files("colonnade.machine") / "models"


def _reason(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]
