"""Instructions as a builder collects them, and the places that their operands get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from hfopt.functional import Epilogue, LinearWeights, QuantizedWeights, Scoring
from hfopt.functional.quantized import terms_of
from hfopt.kernels import step as kernels
from hfopt.kernels.instruction import FORMAT_COLUMNS, LOGITS, Instruction
from hfopt.program.listing import Line
from hfopt.program.memory import Lifetime, plan

NO_FORMAT = (0,) * FORMAT_COLUMNS


@dataclass(frozen=True, eq=False)
class Value:
    """The place of `size` numbers for each token, or, behind `Builder.take_last`, for each row."""

    size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Written:
    """An instruction whose operands have no places yet.

    operands: by the column that names their place. in_place: what it writes may lie where its IN does, if nothing reads that
    afterwards.
    """

    instruction: Instruction
    layer: int | None
    per_row: bool
    operands: dict[str, Value]
    columns: dict[str, int]
    shapes: str
    then: str = ""
    scalar: float = 0.0
    format: Sequence[int] = NO_FORMAT
    in_place: bool = False
    n_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def out(self) -> Value:
        """What it writes; with IN alone, it works in place."""
        return self.operands.get("OUT") or self.operands["IN"]


def places_of(written: Sequence[Written], logits: Value) -> tuple[dict[Value, int], int]:
    """(place of each value, bytes of them all)."""
    lifetimes: dict[Value, Lifetime] = {}
    for index, each in enumerate(written):
        for value in each.operands.values():
            n_bytes = value.size * value.dtype.itemsize
            lifetimes.setdefault(value, Lifetime(n_bytes, index, index)).last = index
    same: dict[Value, Value] = {}  # value -> the one that it lies in the place of
    for index, each in enumerate(written):
        x = same.get(each.operands.get("IN", logits), each.operands.get("IN", logits))
        if each.in_place and lifetimes[x].last == index:
            same[each.out] = x
            lifetimes[x].last = lifetimes.pop(each.out).last
    del lifetimes[same.get(logits, logits)]
    found, row_bytes = plan(list(lifetimes.values()))
    places = dict(zip(lifetimes, found, strict=True)) | {same.get(logits, logits): LOGITS}
    return places | {value: places[other] for value, other in same.items()}, row_bytes


def row_of(written: Written, places: dict[Value, int]) -> np.ndarray:
    """The instruction as a row of a program, int64 [columns]."""
    operands = {name: places[value] for name, value in written.operands.items()}
    return kernels.row_of(written.instruction, PER_ROW=int(written.per_row), **operands, **written.columns)


def line_of(written: Written, places: dict[Value, int]) -> Line:
    """The instruction as a line of the listing."""
    out = places[written.out]
    reads = [places[value] for name, value in written.operands.items() if name != "OUT"]
    if written.instruction in (kernels.ADD_LOOKED_UP, kernels.MULTIPLY, kernels.ADD_DELTAS):
        reads.append(out)
    return Line(
        name=written.instruction.name,
        layer=written.layer,
        shapes=written.shapes,
        then=written.then,
        reads=tuple(reads),
        writes=None if out == LOGITS else out,
        **written.n_bytes,
    )


def format_of(
    weights: LinearWeights | QuantizedWeights, dtype: torch.dtype
) -> tuple[Instruction, Sequence[int], str]:
    """(instruction, row of formats, what to add to the shapes) of a linear layer."""
    if isinstance(weights, LinearWeights):
        return kernels.LINEAR, NO_FORMAT, ""
    levels = 0 if weights.levels is None else weights.levels.data_ptr()
    terms = terms_of(weights.compute, dtype)
    format = (weights.scaling.ctypes.data, weights.bits, weights.group, levels, terms)
    return kernels.QUANTIZED_LINEAR, format, f", {weights.bits} bits"


def in_words(epilogue: Epilogue[Value]) -> str:
    """What the kernel of a linear layer does to its results, for the listing."""
    n_residuals = len(epilogue.residuals)
    parts = [
        *([epilogue.activation] if epilogue.activation else []),
        *(["gate × up"] if epilogue.gated else []),
        *([f"+ {n_residuals} residual{'s' if n_residuals > 1 else ''}"] if n_residuals else []),
    ]
    return ", ".join(parts)


def scores_in_words(scoring: Scoring) -> str:
    """What attention makes of scores beside their scale, for the listing."""
    parts = [
        *([f"softcap {scoring.softcap:g}"] if scoring.softcap is not None else []),
        *(["slopes of ranks" if scoring.ranked else "slopes"] if scoring.slopes is not None else []),
        *(["sinks"] if scoring.sinks is not None else []),
        *([f"window {scoring.window:,}"] if scoring.window is not None else []),
    ]
    return ", ".join(parts)
