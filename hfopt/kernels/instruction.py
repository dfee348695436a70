"""Instructions of a program, as records beside their kernels.

A program is a table of int64 with a row for each instruction, and a float64 for each. A row has the common columns, then
those of its own that the record of the instruction names. IN and OUT are slots: places in the arena, in bytes a token,
of arrays [n_rows n_new, ...], or [n_rows n_last, ...] where PER_ROW is 1. `kernels.step` numbers the records and walks
the rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hfopt.errors import InvalidInput
from hfopt.kernels.jit import compiler
from hfopt.kernels.simd.types import INTP

COMMON = ("OP", "IN", "OUT", "SIZE", "PER_ROW")
OP, IN, OUT, SIZE, PER_ROW = range(len(COMMON))
OWN = len(COMMON)  # the first of the other columns
NONE, LOGITS = -1, -2  # in place of a slot

UNKNOWN_INDEX, UNKNOWN_ROW = 1, 2  # what `check` finds


@dataclass(frozen=True, eq=False)
class Instruction:
    """What can stand in a row of a program.

    name: in listings. columns: names of its own numbers, in order. Bodies, which keep nothing from call to call, and get
    pointers of the types of activations (`like`) and of the cache (`held`):

        run(like, held, operands: Operands, step: Step)    does the work
        scratch(like, own, format, sizes: Sizes)           bytes of scratch that it needs, at most
        check(held, own, step: Step)                       0, UNKNOWN_INDEX or UNKNOWN_ROW, before anything is written

    needs_formats: it reads `Operands.format`; needs_group: it reads `Step.group`. Programs without do not compile it.
    """

    name: str
    columns: tuple[str, ...]
    run: Callable[..., Any]
    scratch: Callable[..., Any] | None = None
    check: Callable[..., Any] | None = None
    needs_formats: bool = False
    needs_group: bool = False

    def row(self, op: int, **columns: int) -> list[int]:
        """The row of a program that does this; IN and OUT are no slots, SIZE and PER_ROW 0 unless they are given.

        op: its number. Raises `InvalidInput` if a column of its own is missing, or not known.
        """
        given = {"OP": op, "IN": NONE, "OUT": NONE, "SIZE": 0, "PER_ROW": 0} | columns
        names = (*COMMON, *self.columns)
        if given.keys() != set(names):
            raise InvalidInput(f"{self.name} is given {', '.join(columns)}: {', '.join(self.columns)} are needed, and "
                               f"may follow {', '.join(COMMON[1:])}")  # fmt: skip
        return [given[name] for name in names]


class Operands(NamedTuple):
    """What one instruction is told."""

    x: Any  # addresses
    out: Any
    n: Any  # tokens, or the last ones of each row where PER_ROW is 1
    size: Any
    scalar: Any  # float64
    own: Any  # pointer to its own columns
    format: Any  # pointer to `Format`, or None


class Cached(NamedTuple):
    """The cache of all layers."""

    records: Any  # pointer to `cache_record`s, one after the other
    prefix_len: Any
    suffix_len: Any
    prefix_row: Any  # pointers to int32
    table: Any
    table_row: Any  # elements from a row to the next
    part: Any  # where new tokens go, PREFIX or SUFFIX
    first: Any  # column of the first one


class Step(NamedTuple):
    """What all instructions of a program are told."""

    n_rows: Any
    n_new: Any  # tokens of a row
    n_last: Any  # of them whose logits are wanted: the last one, or all of tokens that are checked
    n_tokens: Any  # of all rows
    arena: Any  # address
    tables: Any  # pointer to int64 [n, 2], see TABLE_ADDRESS
    ids: Any  # pointer to int64 [2, n_tokens]: tokens, positions
    cache: Cached
    kind: Any  # of mask
    mask: Any  # address, or 0
    mask_row: Any  # bytes from a row to the next
    scratch: Any  # address
    threads: Any  # that it is made for
    deltas: Any  # pointer to `deltas.Deltas`, of the adapters of the request
    group: Any  # pointer to `Group`, of processes that have the model together, or None


class Group(NamedTuple):
    """Addresses of what collectives are told, see `shared.member`, and of the first status of theirs that was not DONE."""

    member: Any
    status: Any


class Sizes(NamedTuple):
    """What scratch depends on, besides the columns of an instruction."""

    n: Any  # tokens, or the last ones of each row where PER_ROW is 1
    size: Any
    n_rows: Any
    n_new: Any
    n_last: Any
    threads: Any


class Format(NamedTuple):
    """What quantised layers are told besides their columns: see `quantized.quantized_linear`."""

    scaling: Any
    bits: Any
    group: Any
    levels: Any
    terms: Any


FORMAT_COLUMNS = len(Format._fields)


@intrinsic
def format_at(typingctx, formats, i):
    """Pointer to row i of an array of formats; None if that is None."""
    if formats is types.none:
        return types.none(formats, i), lambda context, builder, sig, args: context.get_dummy_value()

    def codegen(context, builder, sig, args):
        first = compiler.array_data(context, builder, sig.args[0], args[0])
        return builder.gep(first, [builder.mul(args[1], ir.Constant(INTP, FORMAT_COLUMNS))])

    return types.CPointer(types.int64)(formats, i), codegen


@intrinsic
def pointer_or_none(typingctx, array):
    """Pointer to the first element; None if that is None."""
    if array is types.none:
        return types.none(array), lambda context, builder, sig, args: context.get_dummy_value()

    def codegen(context, builder, sig, args):
        return compiler.array_data(context, builder, sig.args[0], args[0])

    return types.CPointer(array.dtype)(array), codegen


@intrinsic
def read_fields(typingctx, p, kind):
    """The named tuple of int64 at p."""
    n_fields = len(kind.instance_class._fields)
    result = types.NamedUniTuple(types.int64, n_fields, kind.instance_class)

    def codegen(context, builder, sig, args):
        places = [builder.gep(args[0], [ir.Constant(INTP, place)]) for place in range(n_fields)]
        return context.make_tuple(builder, sig.return_type, [builder.load(place) for place in places])

    return result(p, kind), codegen
