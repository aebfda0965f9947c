"""Which layers lose how much: one choice a layer under a budget, a multiple-choice knapsack solved by HiGHS.

A plan is what comes of it: a small TOML file, one line a layer, that can be read, edited and passed back
(`colonnade prune --plan FILE`). Losses of single layers are added up: for small errors the divergence of the answers is
quadratic in them, and errors of different layers are nearly independent.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from colonnade.errors import UserError
from colonnade.onnx_io import check_writable, writing_aside
from colonnade.pattern import ColumnPattern

FORMAT = 1
TIME_LIMIT_S = 20.0
GAP = 1e-4  # of the objective: losses are not known as well as that


@dataclass(frozen=True)
class Choice:
    """What may become of one layer. pattern: None is dense; seconds: of all its runs in one inference; loss: what it
    costs by itself, 0 for dense; source: where the time is from (``measured``, ``modelled on …``, ``estimated``)."""

    pattern: ColumnPattern | None
    seconds: float
    loss: float
    source: str = "measured"


Choices = Mapping[str, Sequence[Choice]]


def fastest(choices: Choices) -> dict[str, Choice]:
    """The quickest choice of every layer, the less harmful one of equals."""
    return {name: min(row, key=lambda c: (c.seconds, c.loss)) for name, row in choices.items()}


def seconds(chosen: Mapping[str, Choice]) -> float:
    """Of the chosen layers together."""
    return sum(choice.seconds for choice in chosen.values())


def loss(chosen: Mapping[str, Choice]) -> float:
    """Of the chosen layers together."""
    return sum(choice.loss for choice in chosen.values())


def allocate(choices: Choices, limit: float) -> dict[str, Choice]:
    """One choice for every layer: the smallest sum of losses among those whose times add up to at most `limit` seconds.

    Raises UserError when even the quickest choices take longer.
    """
    quickest = fastest(choices)
    # The solver's own tolerance must not turn the quickest plan into an impossible one.
    if seconds(quickest) >= limit * (1 - 1e-9):
        if seconds(quickest) > limit * (1 + 1e-9):
            raise UserError(
                f"{1e3 * limit:.3g} ms cannot be reached: the quickest choices of {len(choices)} layers take "
                f"{1e3 * seconds(quickest):.3g} ms"
            )
        return quickest
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    flat = [(name, choice) for name, row in choices.items() for choice in row]
    if not flat:
        return {}
    place = {name: at for at, name in enumerate(choices)}
    rows = np.array([place[name] for name, _ in flat])
    one_each = coo_array((np.ones(len(flat)), (rows, np.arange(len(flat)))), shape=(len(choices), len(flat)))
    times = np.array([choice.seconds for _, choice in flat]) / limit
    losses = np.array([max(choice.loss, 0.0) for _, choice in flat])
    # A little of the time, so that of two choices without loss the quicker one is taken.
    goal = losses / max(losses.max(initial=0.0), 1e-300) + 1e-7 * times
    found = milp(
        goal,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(times[None], -np.inf, 1)],
        options={"mip_rel_gap": GAP, "time_limit": TIME_LIMIT_S, "presolve": False},
    )
    if found.x is None:
        raise UserError(f"no plan was found within {TIME_LIMIT_S:.0f} s ({found.message}): give fewer choices")
    return {name: choice for (name, choice), taken in zip(flat, found.x, strict=True) if taken > 0.5}


@dataclass(frozen=True)
class PrunePlan:
    """The pattern of every layer by its name (None: dense), with remarks for the reader: `head` for the whole, `notes`
    by layer."""

    layers: Mapping[str, ColumnPattern | None]
    head: Sequence[str] = ()
    notes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, choices: Choices, chosen: Mapping[str, Choice], head: Sequence[str] = ()) -> PrunePlan:
        """What was chosen, each line with its time beside the dense one and its loss."""
        notes = {}
        for name, choice in chosen.items():
            dense = next((c for c in choices[name] if c.pattern is None), choice)
            text = f"{1e3 * choice.seconds:.3f} ms {choice.source}"
            if choice.pattern is not None:
                text += f", dense {1e3 * dense.seconds:.3f} ms; loss {choice.loss:.2g}"
            notes[name] = text
        return cls({name: choice.pattern for name, choice in chosen.items()}, tuple(head), notes)

    def text(self) -> str:
        """The file."""
        lines = [f"# {line}" for line in self.head]
        lines += [f"format = {FORMAT}", "", "[layers]"]
        for name, pattern in self.layers.items():
            note = f"  # {self.notes[name]}" if name in self.notes else ""
            lines.append(f"{json.dumps(name, ensure_ascii=False)} = {_value(pattern)}{note}")
        return "\n".join(lines) + "\n"

    def write(self, path: Path | str, *, force: bool = False) -> None:
        """Write the file, whole or not at all. Raises UserError if it exists without `force` or cannot be written."""
        path = Path(path)
        check_writable(path, force=force)
        with writing_aside(path) as aside:
            aside.write_text(self.text(), encoding="utf-8")

    @classmethod
    def read(cls, path: Path | str) -> PrunePlan:
        """The plan of a file. Raises UserError that names the layer which is wrong, and what is expected."""
        path = Path(path)
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: there is no such file") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a plan ({' '.join(str(error).split())})") from None
        if content.get("format") != FORMAT:
            raise UserError(f"{path}: a plan of format {content.get('format')!r}, expected format = {FORMAT}")
        layers = content.get("layers")
        if not isinstance(layers, dict) or not layers or set(content) - {"format", "layers"}:
            raise UserError(f"{path}: expected `format = {FORMAT}` and [layers] with one line for each layer")
        return cls({name: _pattern(value, f"{path}: layer {name!r}") for name, value in layers.items()})


def _value(pattern: ColumnPattern | None) -> str:
    if pattern is None:
        return '"dense"'
    group = f", group = {pattern.group}" if pattern.group is not None else ""
    kind = f', winograd = "{pattern.winograd}"' if pattern.winograd else ""
    return f"{{ sparsity = {float(pattern.sparsity)!r}, tile = {pattern.tile}{group}{kind} }}"


def _pattern(value: Any, where: str) -> ColumnPattern | None:
    if value == "dense":
        return None
    known = {"sparsity", "tile", "group", "winograd"}
    if not isinstance(value, dict) or "sparsity" not in value or set(value) - known:
        raise UserError(f'{where} is {value!r}: expected "dense", or {{ sparsity = 0.75, tile = 8 }}')
    try:
        return ColumnPattern(value["sparsity"], value.get("tile", 8), value.get("group"), value.get("winograd", ""))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
