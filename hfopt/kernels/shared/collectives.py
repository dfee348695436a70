"""The collectives, as bodies. Each takes the address of this rank's `Member` and returns a status: DONE, NOT_YET, after
which it is called again with the same arguments, or a kind of failure with its rank << 8.

Sums do not depend on timing, sizes of parts or threads: they are those of `sums`, the same bits on all ranks.
"""

from hfopt.kernels.jit.parallel import body, parallel_for, threads_for
from hfopt.kernels.sampling import greater
from hfopt.kernels.shared.atomics import copy_block
from hfopt.kernels.shared.member import (
    ALL_GATHER,
    ALL_REDUCE,
    ANY,
    ARG_MAX,
    BARRIER,
    BROADCAST,
    DONE,
    EXCHANGE,
    INPUT,
    IS_WAITING,
    RESULT,
    SEQUENCE,
    arrive,
    begin,
    buffer,
    elements_of,
    member_at,
    state_at,
    wait,
    what_of,
)
from hfopt.kernels.shared.sums import sum_inputs
from hfopt.kernels.simd.pointer import (
    address_as,
    address_of,
    floats_at,
    integers_at,
    item_bytes,
    shifted,
)

# bytes up to which each rank adds up all by itself, with one synchronisation less than in shares
WHOLE = 1 << 16
_PIECE = 1 << 14  # bytes that a thread takes at a time
_PARALLEL_SIZE = 1 << 17  # bytes of a part; below, more threads cost more than they save
_PAIR = 12  # bytes of an index and a value


# ---- sums -------------------------------------------------------------------------------------------------------------


@body
def _share(m, n):
    """Elements of a part of n that one rank adds up: whole lines."""
    return ((n + m.size - 1) // m.size + 63) // 64 * 64


@body
def _first_half(index, like, m, sequence, x, n_copied, copied_at, n_summed, summed_at):
    """Pieces of what is done before `arrive`: of the next part into the input, then of the share of the part before."""
    item = item_bytes(like)
    piece = _PIECE // item
    n_copies = (n_copied + piece - 1) // piece
    if index < n_copies:
        first = index * piece
        source = x + (copied_at + first) * item
        count = min(piece, n_copied - first) * item
        copy_block(source, count, buffer(m, m.rank, INPUT, sequence) + first * item)
        return
    share = _share(m, n_summed)
    first = m.rank * share + (index - n_copies) * piece
    count = min(piece, min((m.rank + 1) * share, n_summed) - first)
    if count > 0:
        out = buffer(m, m.rank, RESULT, sequence) + (first - m.rank * share) * item
        sum_inputs(like, m, sequence - 1, first, count, address_as(out, like))
        copy_block(out, count * item, x + (summed_at + first) * item)


@body
def _second_half(index, like, m, sequence, x, n_summed, summed_at):
    """Pieces of what is done behind `wait`: of the shares of the other ranks."""
    item = item_bytes(like)
    piece, share = _PIECE // item, _share(m, n_summed)
    n_pieces = (share + piece - 1) // piece
    rank = index // n_pieces
    within = (index - rank * n_pieces) * piece
    first = rank * share + within
    count = min(piece, min((rank + 1) * share, n_summed) - first)
    if count > 0 and rank != m.rank:
        source = buffer(m, rank, RESULT, sequence) + within * item
        copy_block(source, count * item, x + (summed_at + first) * item)


@body
def _reduce_whole(like, m, state, x, n, what):
    """Each rank adds up all of it."""
    if state[IS_WAITING] == 0:
        copy_block(x, n * item_bytes(like), buffer(m, m.rank, INPUT, state[SEQUENCE] + 1))
        arrive(m, state, what)
    status = wait(m, state, what)
    if status == DONE:
        sum_inputs(like, m, state[SEQUENCE], 0, n, address_as(x, like))
    return status


@body
def _reduce_shares(like, m, state, x, n, what):
    """In parts, of each of which each rank adds up a share. While one part is added up, the next one is written."""
    part = m.capacity // item_bytes(like)
    piece = _PIECE // item_bytes(like)
    n_parts = (n + part - 1) // part
    while state[EXCHANGE] <= n_parts:
        k = state[EXCHANGE]
        copied_at, summed_at = k * part, (k - 1) * part
        n_copied = min(part, n - copied_at) if k < n_parts else 0
        n_summed = min(part, n - summed_at) if k > 0 else 0
        n_pieces = (_share(m, n_summed) + piece - 1) // piece
        threads = threads_for(n_pieces, (n_copied + n_summed) * item_bytes(like), _PARALLEL_SIZE)
        if state[IS_WAITING] == 0:
            sequence = state[SEQUENCE] + 1
            halves = like, m, sequence, x, n_copied, copied_at, n_summed, summed_at
            parallel_for(_first_half, threads, (n_copied + piece - 1) // piece + n_pieces, halves)
            arrive(m, state, what)
        status = wait(m, state, what)
        if status != DONE:
            return status
        arguments = like, m, state[SEQUENCE], x, n_summed, summed_at
        parallel_for(_second_half, threads, m.size * n_pieces, arguments)
        state[EXCHANGE] = k + 1
    state[EXCHANGE] = 0
    return DONE


@body
def all_reduce(like, member, x, n):
    """x = the sum over ranks, in place.

    Address of n elements of the type of the pointer `like`: float32, bfloat16, float16.
    """
    m, state = member_at(member), state_at(member)
    status = begin(m, state)
    if status != DONE:
        return status
    what = what_of(ALL_REDUCE, elements_of(like), n)
    if n * item_bytes(like) <= min(WHOLE, m.capacity):
        return _reduce_whole(like, m, state, x, n, what)
    return _reduce_shares(like, m, state, x, n, what)


# ---- what is handed on as it is ---------------------------------------------------------------------------------------


@body
def _put_rows(source, first, count, row_bytes, out, step):
    """Bytes first to first + count of rows of row_bytes each, to rows that are `step` apart."""
    done = 0
    while done < count:
        row = (first + done) // row_bytes
        column = first + done - row * row_bytes
        n = min(row_bytes - column, count - done)
        copy_block(source + done, n, out + row * step + column)
        done += n


@body
def all_gather(member, x, n_rows, row_bytes, out):
    """out[row, rank] = row of x of that rank.

    Addresses of x [n_rows, row_bytes] and out [n_rows, ranks, row_bytes], bytes, which do not overlap.
    """
    m, state = member_at(member), state_at(member)
    status = begin(m, state)
    if status != DONE:
        return status
    n = n_rows * row_bytes
    what = what_of(ALL_GATHER, ANY, n)
    while state[EXCHANGE] * m.capacity < n or state[EXCHANGE] == 0:
        first = state[EXCHANGE] * m.capacity
        count = min(m.capacity, n - first)
        if state[IS_WAITING] == 0:
            copy_block(x + first, count, buffer(m, m.rank, INPUT, state[SEQUENCE] + 1))
            arrive(m, state, what)
        status = wait(m, state, what)
        if status != DONE:
            return status
        for rank in range(m.size):
            source = buffer(m, rank, INPUT, state[SEQUENCE])
            _put_rows(source, first, count, row_bytes, out + rank * row_bytes, m.size * row_bytes)
        state[EXCHANGE] += 1
    state[EXCHANGE] = 0
    return DONE


@body
def broadcast(member, x, n_bytes):
    """x = that of rank 0. Address of n_bytes."""
    m, state = member_at(member), state_at(member)
    status = begin(m, state)
    if status != DONE:
        return status
    what = what_of(BROADCAST, ANY, n_bytes)
    while state[EXCHANGE] * m.capacity < n_bytes or state[EXCHANGE] == 0:
        first = state[EXCHANGE] * m.capacity
        count = min(m.capacity, n_bytes - first)
        if state[IS_WAITING] == 0:
            if m.rank == 0:
                copy_block(x + first, count, buffer(m, 0, INPUT, state[SEQUENCE] + 1))
            arrive(m, state, what)
        status = wait(m, state, what)
        if status != DONE:
            return status
        if m.rank != 0:
            copy_block(buffer(m, 0, INPUT, state[SEQUENCE]), count, x + first)
        state[EXCHANGE] += 1
    state[EXCHANGE] = 0
    return DONE


@body
def barrier(member):
    """Wait until all ranks are here."""
    m, state = member_at(member), state_at(member)
    status = begin(m, state)
    if status != DONE:
        return status
    what = what_of(BARRIER, ANY, 0)
    if state[IS_WAITING] == 0:
        arrive(m, state, what)
    return wait(m, state, what)


# ---- the largest ------------------------------------------------------------------------------------------------------


@body
def _choose(m, sequence, count, values, indices):
    """The best of what the ranks have written for each of `count` rows."""
    for row in range(count):
        for rank in range(m.size):
            source = buffer(m, rank, INPUT, sequence)
            index, value = integers_at(source)[row], floats_at(source + 8 * count)[row]
            is_better = greater(value, values[row])
            is_earlier = not greater(values[row], value) and index < indices[row]
            if rank == 0 or is_better or is_earlier:
                values[row], indices[row] = value, index


@body
def arg_max(member, values, indices, n):
    """For each of n rows the largest value of all ranks, and its index; of equal ones the lowest index. A NaN is larger than
    all numbers. In place.

    Addresses of values float32 [n] and indices int64 [n].
    """
    m, state = member_at(member), state_at(member)
    status = begin(m, state)
    if status != DONE:
        return status
    what, part = what_of(ARG_MAX, ANY, n), m.capacity // _PAIR
    while state[EXCHANGE] * part < n or state[EXCHANGE] == 0:
        first = state[EXCHANGE] * part
        count = min(part, n - first)
        own_values, own_indices = (
            shifted(floats_at(values), first),
            shifted(integers_at(indices), first),
        )
        if state[IS_WAITING] == 0:
            target = buffer(m, m.rank, INPUT, state[SEQUENCE] + 1)
            copy_block(address_of(own_indices), 8 * count, target)
            copy_block(address_of(own_values), 4 * count, target + 8 * count)
            arrive(m, state, what)
        status = wait(m, state, what)
        if status != DONE:
            return status
        _choose(m, state[SEQUENCE], count, own_values, own_indices)
        state[EXCHANGE] += 1
    state[EXCHANGE] = 0
    return DONE
