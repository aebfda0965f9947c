"""How the lanes of an output plane are cut into strips on an ISA of fixed vectors, and what becomes of the last lanes.

Whole vectors are shared out evenly among as few strips as their width allows. The lanes behind the last whole vector
are one more vector, most of whose lanes may hold no pixel; or each of them is computed with the *rows* of a tile in the
lanes of a vector (``tail``): its weights stand side by side, so a lane costs one multiply-add a column, whatever the
number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from colonnade.kernels.call import Field
from colonnade.kernels.isa import Isa
from colonnade.kernels.registry import Candidate

TAILS = (1, 2, 4, 8, 12)  # lanes that a block may have beside its whole vectors
NARROW = 0.5  # what a multiply-add of at most half a vector costs, where vectors are made of two halves
VECTOR = 16  # lanes of the widest fixed vector
GAIN = 0.8  # the tail's multiply-adds over those of the vector that it saves, at most


def row_width(mr: int, isa: Isa) -> int:
    """Lanes of the narrowest vector that holds ``mr`` rows; 0 where none does."""
    return 0 if isa.scalable else next((n for n in (4, 8, 16) if mr <= n <= isa.lanes), 0)


def lane_cost(mr: int, isa: Isa) -> float:
    """Of a lane of the tail, in multiply-adds of a whole vector. AVX-512 is taken as made of two halves, or of ports of
    which narrow ones are twice as many."""
    return NARROW if isa.lanes == 16 and row_width(mr, isa) <= 8 else 1.0


def tails(mr: int, nv: int, isa: Isa, paired: bool = False) -> list[list[int]]:
    """For every number of vectors 0 .. ``nv``: the tails for which a block has registers, and that are worth it.

    The tail's weights and the strip's vectors are not needed at the same time. Where no instruction broadcasts an
    operand from memory, the tail's input takes a register as well. ``paired``: of kernels that take two columns at a
    time, which hold both of them and the sums of their products.
    """
    if not row_width(mr, isa):
        return [[] for _ in range(nv + 1)]
    more = 1 if isa.lanes == 16 else 2
    return [
        [
            t
            for t in TAILS
            if t < isa.lanes
            and mr * v + t + max(3 * v + 3 if paired else v + 1, more) <= isa.registers
            and t * lane_cost(mr, isa) <= GAIN * mr
        ]
        for v in range(nv + 1)
    ]  # fmt: skip


@dataclass(frozen=True)
class Strips:
    """``count`` strips share ``vectors`` whole vectors evenly, the wider ones first; the last has ``tail`` lanes more,
    which are computed as if they were ``done``."""

    count: int
    vectors: int
    tail: int = 0
    done: int = 0

    @property
    def widths(self) -> list[int]:
        """Vectors of every strip."""
        share, more = divmod(self.vectors, self.count)
        return [share + (i < more) for i in range(self.count)]

    def lanes(self, isa: Isa) -> int:
        """Of the widest strip, rounded up to whole vectors: a row of its panel."""
        widths = self.widths
        return max(widths[0], widths[-1] + (self.tail > 0)) * isa.lanes


def whole(lanes: int, nv: int, isa: Isa) -> Strips:
    """All ``lanes`` in whole vectors, at most ``nv`` a strip. On a scalable ISA a strip is one group, of registers as
    they are ``taken``."""
    if isa.scalable:
        count = -(-lanes // (isa.taken * nv))
        return Strips(count, count)
    vectors = -(-lanes // isa.lanes)
    return Strips(-(-vectors // nv), vectors)


def tailed(lanes: int, mr: int, nv: int, isa: Isa, paired: bool = False) -> Strips | None:
    """``lanes`` in whole vectors and a tail; None where there is no tail, or no block for it."""
    allowed = tails(mr, nv, isa, paired)
    if isa.scalable or not lanes % isa.lanes:
        return None
    vectors, tail = divmod(lanes, isa.lanes)
    least = max(1, -(-vectors // nv))
    for count in (least, least + 1):  # a strip less than full has registers for a longer tail
        done = next((t for t in allowed[vectors // count] if t >= tail), 0)
        if done:
            return Strips(count, vectors, tail, done)
    return None


def fields(cut: Strips, lanes: int, plane: int, params: Mapping[str, int]) -> dict[str, Field]:
    """What a call is told of the lanes of its output's planes, as ``cut``, and of the order in which it takes them."""
    return {
        "lanes": lanes, "plane": plane, "strips": cut.count, "tail": cut.tail, "strip_block": params["strip_block"],
        "prefetch": params["prefetch"], "split_tiles": params["split_tiles"],
    }  # fmt: skip


def taken(candidate: Candidate, lanes: int, mr: int, nv: int, isa: Isa) -> Strips:
    """The strips that ``candidate`` stands for. Raises ``ValueError`` where its kernel has no block for the tail."""
    paired = candidate.kernel.startswith("f32_pairconv_")
    cut = tailed(lanes, mr, nv, isa, paired) if candidate.params["tail"] else whole(lanes, nv, isa)
    if cut is None:
        raise ValueError(f"{candidate.key()}: no block for the last of {lanes} lanes")
    return cut
