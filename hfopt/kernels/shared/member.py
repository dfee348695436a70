"""A rank's view of a group: the segment that all map, and how they wait for each other.

The segment, on lines of 128 bytes (two of a cache: some cores fetch them in pairs):

    0       head                    MAGIC, VERSION, ranks, bytes of a buffer, nonce
    128     failure                 0, or why the group has failed: reason | rank << 8, the first one stays
    256     of each rank            one line: sequence, what for even and for odd sequences
                                    one line: how many sleep until the sequence changes, process
    ...     buffers of each rank    inputs for even and for odd sequences, results for even and for odd ones

An operation is a number of *exchanges*. In each, a rank writes to its buffers of the parity of the next sequence, raises
its sequence (`arrive`), waits until all have (`wait`), and then may read what all have written. Nobody overwrites that
before all have raised the sequence twice more, hence have read it: one synchronisation an exchange is enough.

A rank says what it does beside its sequence, so that all ranks see when they do not do the same.

`Member` is a record of int64 that each process has for itself. Behind its fields is what an operation keeps while it
is under way: one that returns NOT_YET is called again with the same arguments, and goes on where it was.
"""

from typing import NamedTuple

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from hfopt.kernels.instruction import read_fields
from hfopt.kernels.jit.compiler import INTP
from hfopt.kernels.jit.parallel import body, inlined
from hfopt.kernels.shared.atomics import (
    add_atomic,
    fence_all,
    load_acquire,
    pause,
    store_release,
)
from hfopt.kernels.shared.system import nanoseconds, sleep_while, wake_all, yield_core
from hfopt.kernels.simd.pointer import integers_at, is_bits, is_halves, shifted

MAGIC, VERSION = 0x74706F6668, 1  # "hfopt"
LINE = 128
HEAD_WORDS = 5
FAILURE, RANKS, RANK = LINE, 2 * LINE, 2 * LINE  # bytes: of the failure, of the first rank, from rank to rank
WHAT = 1  # words of the first line of a rank, behind the sequence
SLEEPERS, PROCESS = LINE // 8, LINE // 8 + 1  # words behind the sequence
PAGE = 4096
INPUT, RESULT, BUFFERS = 0, 2, 4  # the buffers of a rank


class Member(NamedTuple):
    """What does not change. segment is 0 when it is closed."""

    segment: int  # address
    rank: int
    size: int  # ranks
    capacity: int  # bytes of a buffer
    spin: int  # nanoseconds to wait awake, before sleep
    patience: int  # nanoseconds after which NOT_YET is returned
    limit: int  # nanoseconds after which a rank that has not come is LATE


# what an operation keeps, words behind the fields
SEQUENCE, EXCHANGE, IS_WAITING, BEGIN = range(4)
_STATE = len(Member._fields)
MEMBER_WORDS = _STATE + 4

# what operations return: a kind, and a rank << 8
DONE, NOT_YET, LATE, FAILED, DIFFERENT, CLOSED = range(6)

# of failures: how a rank has left the group
ENDED, INTERRUPTED, GIVEN_UP, LEFT = range(1, 5)

# operations, for `what`
BARRIER, ALL_REDUCE, ALL_GATHER, BROADCAST, ARG_MAX = range(1, 6)
FLOAT32, BFLOAT16, FLOAT16, ANY = range(1, 5)  # elements

_LOOK = 16  # pauses from look to look at the clock, about a microsecond
# nanoseconds after which the core is offered to others: the rank that is waited for may be one of them
_ALONE = 5_000
_NAP = 5_000_000  # nanoseconds of sleep, after which failures of others are seen


def buffers_at(size: int) -> int:
    """Bytes from the beginning of a segment of so many ranks to its first buffer."""
    return -(-(RANKS + size * RANK) // PAGE) * PAGE


def segment_bytes(size: int, capacity: int) -> int:
    """Bytes of a segment."""
    return buffers_at(size) + size * BUFFERS * capacity


@intrinsic
def elements_of(typingctx, p):
    """The number of the element type of a pointer, for `what_of`."""
    number = BFLOAT16 if is_bits(p) else FLOAT16 if is_halves(p) else FLOAT32
    return types.int64(p), lambda context, builder, sig, args: ir.Constant(INTP, number)


@inlined
def member_at(address):
    return read_fields(integers_at(address), Member)


@inlined
def state_at(address):
    """Pointer to what an operation keeps."""
    return shifted(integers_at(address), _STATE)


@inlined
def what_of(operation, elements, n):
    """An operation, as one word."""
    return operation | elements << 8 | n << 16


@body
def buffer(m, rank, kind, sequence):
    """Address of a buffer of a rank, INPUT or RESULT, for a sequence."""
    first = m.segment + (RANKS + m.size * RANK + PAGE - 1) // PAGE * PAGE
    return first + (rank * BUFFERS + kind + (sequence & 1)) * m.capacity


@body
def _line(m, rank):
    return integers_at(m.segment + RANKS + rank * RANK)


@body
def begin(m, state):
    """A status before anything is done: whether the group can be used."""
    if m.segment == 0:
        return CLOSED
    # who waits already may yet find that all have come: a rank may leave right behind its last operation
    if state[IS_WAITING] == 0 and load_acquire(integers_at(m.segment + FAILURE)) != 0:
        return FAILED
    return DONE


@body
def arrive(m, state, what):
    """Raise this rank's sequence: its buffers are written."""
    line, sequence = _line(m, m.rank), state[SEQUENCE] + 1
    line[WHAT + (sequence & 1)] = what
    store_release(line, sequence)
    state[SEQUENCE], state[IS_WAITING], state[BEGIN] = sequence, 1, 0
    fence_all()  # who sleeps now was counted before, or sees the sequence
    if load_acquire(shifted(line, SLEEPERS)) != 0:
        wake_all(line)


@body
def _look(m, state, rank, seen, since):
    """While a rank has not come: whether to go on. Sleeps if it takes long."""
    now = nanoseconds()
    if state[BEGIN] == 0:
        state[BEGIN] = now
    line = _line(m, rank)
    if load_acquire(integers_at(m.segment + FAILURE)) != 0:
        # see `begin`
        return DONE if load_acquire(line) >= state[SEQUENCE] else FAILED
    if now - state[BEGIN] > m.limit:
        return LATE | rank << 8
    if now - since > m.patience:
        return NOT_YET
    if now - state[BEGIN] > m.spin:
        add_atomic(shifted(line, SLEEPERS), 1)
        if load_acquire(line) == seen:
            sleep_while(line, seen, _NAP)
        add_atomic(shifted(line, SLEEPERS), -1)
    elif now - state[BEGIN] > _ALONE:
        yield_core()
    return DONE


@body
def wait(m, state, what):
    """Wait until all ranks have arrived; a status."""
    sequence, since, status = state[SEQUENCE], 0, DONE
    for rank in range(m.size):
        line, looks = _line(m, rank), 0
        seen = load_acquire(line)
        while seen < sequence:
            looks += 1
            if looks % _LOOK == 0:
                if since == 0:
                    since = nanoseconds()
                status = _look(m, state, rank, seen, since)
                if status != DONE:
                    return status
            pause()
            seen = load_acquire(line)
        if line[WHAT + (sequence & 1)] != what:
            return DIFFERENT | rank << 8
    state[IS_WAITING] = 0
    return DONE
