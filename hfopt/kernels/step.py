"""New tokens in one launch: a loop over the instructions of a program, which calls their bodies.

`instruction.py` says what a program is made of; here the instructions have their numbers. A program for a request is
checked before it writes anything.
"""

import numpy as np

from hfopt.kernels.attention.attend import ATTEND
from hfopt.kernels.attention.cache_record import PREFIX, SUFFIX
from hfopt.kernels.deltas import ADD_DELTAS
from hfopt.kernels.elementwise import LIMIT, MULTIPLY, SCALE
from hfopt.kernels.embedding import ADD_LOOKED_UP, LOOK_UP, POSITIONS, TOKENS
from hfopt.kernels.gated import ACTIVATE
from hfopt.kernels.instruction import (
    IN,
    LOGITS,
    OP,
    OUT,
    OWN,
    PER_ROW,
    SIZE,
    Cached,
    Instruction,
    Operands,
    Sizes,
    Step,
    format_at,
    pointer_or_none,
)
from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body
from hfopt.kernels.jit.switch import UNKNOWN, switch
from hfopt.kernels.linear.quantized import QUANTIZED_LINEAR
from hfopt.kernels.linear.tiles import LINEAR
from hfopt.kernels.move import PERMUTE, TAKE_LAST
from hfopt.kernels.norm import HEAD_NORM, LAYER_NORM, RMS_NORM
from hfopt.kernels.rope import ROTATE, ROTATE_AND_STORE
from hfopt.kernels.sampling import find_largest
from hfopt.kernels.shared.instructions import (
    ALL_REDUCE,
    GATHER,
    LOOK_UP_PART,
    TAKE_PART,
    choose,
    is_one_piece,
)
from hfopt.kernels.simd.pointer import address_as, address_of, pointer, shifted
from hfopt.kernels.xielu import XIELU

# the number of an instruction, in column OP, is its place here
INSTRUCTIONS: tuple[Instruction, ...] = (
    LOOK_UP,
    ADD_LOOKED_UP,
    RMS_NORM,
    LAYER_NORM,
    LINEAR,
    QUANTIZED_LINEAR,
    ROTATE_AND_STORE,
    ATTEND,
    TAKE_LAST,
    PERMUTE,
    MULTIPLY,
    SCALE,
    HEAD_NORM,
    LIMIT,
    ROTATE,
    XIELU,
    ADD_DELTAS,
    ACTIVATE,
    LOOK_UP_PART,
    TAKE_PART,
    ALL_REDUCE,
    GATHER,
)
COLUMNS = OWN + max(len(each.columns) for each in INSTRUCTIONS)

_FORMATS, _GROUP = range(2)  # places in what a switch is given
UNKNOWN_OPERATION = 3  # what `run_step` returns less: this, and the number of the row


def row_of(instruction: Instruction, **columns: int) -> np.ndarray:
    """A row of a program, int64 [COLUMNS]; see `Instruction.row`."""
    row = np.zeros(COLUMNS, np.int64)
    numbers = instruction.row(INSTRUCTIONS.index(instruction), **columns)
    row[: len(numbers)] = numbers
    return row


def _switch(part: str):
    """The bodies of this name of all instructions."""
    bodies = [getattr(each, part) for each in INSTRUCTIONS]
    needs = [
        _FORMATS if each.needs_formats else _GROUP if each.needs_group else None for each in INSTRUCTIONS
    ]
    return switch(bodies, needs)


_scratch, _check, _run = (_switch(part) for part in ("scratch", "check", "run"))
_GATHER = INSTRUCTIONS.index(GATHER)


@launch
def scratch_bytes(like, code, formats, n_rows, n_new, n_last, threads):
    """Bytes of scratch of the instruction of a program that needs most on so many threads, whatever the context.

    Arguments as in `run_step`.
    """
    most = 0
    for i in range(code.shape[0]):
        row = shifted(pointer(code), i * COLUMNS)
        n = n_rows * (n_last if row[PER_ROW] != 0 else n_new)
        sizes = Sizes(n, row[SIZE], n_rows, n_new, n_last, threads)
        arguments = pointer(like), shifted(row, OWN), format_at(formats, i), sizes
        most = max(most, _scratch(row[OP], (formats, None), arguments))
    return most


@body
def _check_all(held, code, formats, group, step):
    """0 if all instructions are known and find what they need; what is wrong otherwise."""
    for i in range(code.shape[0]):
        row = shifted(pointer(code), i * COLUMNS)
        wrong = _check(row[OP], (formats, group), (held, shifted(row, OWN), step))
        if wrong == UNKNOWN:
            return UNKNOWN_OPERATION + i
        if wrong != 0:
            return wrong
    return 0


@body
def _operands(code, formats, scalars, i, step, logits):
    row = shifted(pointer(code), i * COLUMNS)
    x = logits if row[IN] == LOGITS else step.arena + row[IN] * step.n_tokens
    out = logits if row[OUT] == LOGITS else step.arena + row[OUT] * step.n_tokens
    n = step.n_rows * step.n_last if row[PER_ROW] != 0 else step.n_tokens
    return Operands(x, out, n, row[SIZE], scalars[i], shifted(row, OWN), format_at(formats, i))


@body
def _run_some(like, held, code, formats, group, scalars, step, logits, n):
    """Runs the first n instructions, which were checked."""
    for i in range(n):
        operands = _operands(code, formats, scalars, i, step, logits)
        _run(code[i, OP], (formats, group), (like, held, operands, step))


@body
def _ends_in_gather(code, group, n_logits):
    """Whether the last instruction brings together logits of which each process has some that follow each other."""
    if group is None:
        return False
    row = shifted(pointer(code), (code.shape[0] - 1) * COLUMNS)
    return row[OP] == _GATHER and row[OUT] == LOGITS and is_one_piece(shifted(row, OWN), n_logits)


@body
def _choose_in_parts(like, code, formats, group, scalars, step, logits, chosen):
    """`find_largest` of these logits: each process looks at those that it has."""
    if group is not None:
        last = _operands(code, formats, scalars, code.shape[0] - 1, step, logits)
        choose(like, step.group, last, chosen)


@body
def _follow(ids, chosen, finished, pad, ends):
    """Lets the chosen tokens be those of the next step, `pad` in finished rows; whether none of the others ends its row."""
    goes_on = True
    for row in range(ids.shape[1]):
        if finished[row]:
            chosen[row] = pad
        else:
            for i in range(ends.shape[0]):
                if chosen[row] == ends[i]:
                    goes_on = False
        ids[TOKENS, row] = chosen[row]
        ids[POSITIONS, row] += 1
    return goes_on


@launch
def run_step(
    like,
    held,
    code,
    formats,
    scalars,
    n_rows,
    n_new,
    n_last,
    arena,
    scratch,
    threads,
    tables,
    ids,
    records,
    prefix_len,
    suffix_len,
    in_suffix,
    prefix_row,
    table,
    kind,
    mask,
    logits,
    n_logits,
    chosen,
    finished,
    pad,
    ends,
    deltas,
    group,
):
    """Runs a program for n_new tokens in each of n_rows rows; or for one, and again for the tokens that it chooses itself.
    n_last is 1, or n_new for tokens that are checked: each is computed as in a step of its own, with the same bits.

    Returns how many times, or -UNKNOWN_INDEX, -UNKNOWN_ROW or -(UNKNOWN_OPERATION + number of the row of code) if the first
    found that, nothing written.

    Like an array of the element type, held one of that of the cache, the same, or int8 for codes, for which code is
    compiled of its own; code int64 [n, COLUMNS], scalars float64 [n]; formats int64 [n, FORMAT_COLUMNS], or None without
    instructions that need them, which are only compiled for programs that have some; address of the arena and of
    `scratch_bytes` for so many threads, on 64-byte boundaries; tables int64 [n, 2]: address, rows; ids int64 [2, n_rows
    n_new]: tokens, positions; records int64 [layers, `cache_record`]; lengths the first time, in_suffix, prefix_row and
    table as in `cache.Appended`; kind as in `attention_prefill`, of mask, uint8 [n_rows, n_new keys]: empty if order
    alone hides keys; of one new token, or of some that are checked, [n_rows, keys of the last one, or more]; address of
    logits [n_rows n_last, n_logits], of the element type. chosen int64 [n_steps, n_rows]: the `sampling.argmax` of
    each time, for which those of several processes are not brought together, or no rows if the logits are wanted; behind
    it `pad` in rows that are finished, bool [n_rows]. The last time is one that chooses any of `ends`, int64 [n], for
    another row. deltas int64 [4]: `deltas.Deltas`, all 0 if no row has an
    adapter. group: `instruction.Group`, int64 [2], or None without instructions that need it.
    """
    elements, cached = pointer(like), pointer(held)
    rows = pointer(prefix_row), pointer(table), table.shape[1]
    masked = kind, address_of(pointer(mask)) if mask.size > 0 else 0, mask.shape[1]
    sizes = n_rows, n_new, n_last, n_rows * n_new
    n_steps = max(chosen.shape[0], 1)
    in_parts = chosen.shape[0] > 0 and _ends_in_gather(code, group, n_logits)
    for k in range(n_steps):
        in_prefix = 0 if in_suffix else k
        lengths = prefix_len + in_prefix, suffix_len + k - in_prefix
        part, last = (SUFFIX, lengths[1]) if in_suffix else (PREFIX, lengths[0])
        cache = Cached(pointer(records), *lengths, *rows, part, last - n_new)
        step = Step(
            *sizes,
            arena,
            pointer(tables),
            pointer(ids),
            cache,
            *masked,
            scratch,
            threads,
            pointer(deltas),
            pointer_or_none(group),
        )
        wrong = _check_all(cached, code, formats, group, step)
        if wrong != 0:
            return k if k > 0 else -wrong
        n = code.shape[0] - 1 if in_parts else code.shape[0]
        _run_some(elements, cached, code, formats, group, scalars, step, logits, n)
        if chosen.shape[0] > 0:
            target = shifted(pointer(chosen), n_rows * k)
            if in_parts:
                _choose_in_parts(elements, code, formats, group, scalars, step, logits, target)
            else:
                find_largest(address_as(logits, elements), n_rows, n_logits, target)
            if not _follow(ids, chosen[k], finished, pad, ends):
                n_steps = k + 1
                break
    return n_steps
