"""The collectives, for Python to call; see the bodies of the same names in `collectives`."""

from hfopt.kernels.jit.launch import launch
from hfopt.kernels.shared import collectives
from hfopt.kernels.shared.member import DONE, NOT_YET
from hfopt.kernels.simd.pointer import pointer

_all_reduce, _all_gather = collectives.all_reduce, collectives.all_gather
_broadcast, _arg_max, _barrier = collectives.broadcast, collectives.arg_max, collectives.barrier


@launch
def all_reduce(like, member, x, n):
    """like: an empty array of the element type; address of n of them."""
    return _all_reduce(pointer(like), member, x, n)


@launch
def all_reduce_again(like, member, x, n, times):
    """The same in a row, as in a compiled step, without looking after signals; for measurements."""
    status = DONE
    for _ in range(times):
        status = _all_reduce(pointer(like), member, x, n)
        while status == NOT_YET:
            status = _all_reduce(pointer(like), member, x, n)
        if status != DONE:
            break
    return status


@launch
def all_gather(member, x, n_rows, row_bytes, out):
    return _all_gather(member, x, n_rows, row_bytes, out)


@launch
def broadcast(member, x, n_bytes):
    return _broadcast(member, x, n_bytes)


@launch
def arg_max(member, values, indices, n):
    return _arg_max(member, values, indices, n)


@launch
def barrier(member):
    return _barrier(member)
