"""Caches in blocks (https://arxiv.org/abs/2309.06180): tables through which attention reads them, and writes to them."""

from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body, parallel_for, threads_for
from hfopt.kernels.move import copy_bytes
from hfopt.kernels.simd.pointer import pointer, shifted

_PARALLEL_SIZE = 1 << 16  # bytes to store; below, more threads cost more than they save


@launch
def list_keys(blocks, block_size, block_step, token_step, lengths, first, columns, rows, mask):
    """rows[r, columns[r] + t - first[r]]: where key t of row r lies, as `record_of_keys` counts it, for t from first[r] up
    to lengths[r]; of other columns that of a key of block 0.

    blocks int64 [n_rows, most blocks of a row]: numbers of blocks of `block_size` keys that exist; steps: keys of
    memory from a block to the next and from a token to the next. rows int32 [n_rows, n]: the address of the record is n keys
    before block 0. mask uint8 [n_rows, 1, n], 1 for those tokens, unless it has no rows.
    """
    n = rows.shape[1]
    for r in range(len(lengths)):
        start, end = columns[r], columns[r] + lengths[r] - first[r]
        for c in range(start):
            rows[r, c] = n - c
        for c in range(end, n):
            rows[r, c] = n - c
        c = start
        while c < end:
            t = c - start + first[r]
            b = t // block_size
            within = t - b * block_size
            count = min(block_size - within, end - c)
            place = blocks[r, b] * block_step + within * token_step + n - c
            for k in range(count):
                rows[r, c + k] = place + k * (token_step - 1)
            c += count
        if mask.shape[0] > 0:
            for c in range(n):
                mask[r, 0, c] = c >= start and c < end


@body
def _store_head(index, slots, n_tokens, n_heads, block_size, n_bytes, source, target):
    """One head of keys or of values, token by token in order."""
    which, head = index // n_heads, index % n_heads
    source, target = shifted(source, 3 * which), shifted(target, 4 * which)
    for t in range(n_tokens):
        slot = slots[t]
        if slot >= 0:
            block = slot // block_size
            place = block * target[1] + head * target[2] + (slot - block * block_size) * target[3]
            copy_bytes(source[0] + t * source[1] + head * source[2], n_bytes, target[0] + place)


@launch
def store_tokens(slots, n_heads, block_size, n_bytes, source, target):
    """Copies keys and values of tokens into the slots of a cache; tokens of negative slots go nowhere, and of several of one
    slot the last one stays.

    slots int64 [n_tokens], each below the number of blocks times `block_size`; n_bytes of a head of a token. int64, in
    bytes, of keys and then of values: source [2, 3], address, from a token to the next, from a head to the next; target
    [2, 4], address, from a block, a head, and a token to the next.
    """
    n_items, work = 2 * n_heads, 2 * n_heads * len(slots) * n_bytes
    threads = threads_for(n_items, work, _PARALLEL_SIZE)
    arguments = pointer(slots), len(slots), n_heads, block_size, n_bytes, pointer(source), pointer(target)
    parallel_for(_store_head, threads, n_items, arguments)
