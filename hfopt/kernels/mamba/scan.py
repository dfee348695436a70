"""Selective scans (Mamba, https://arxiv.org/abs/2312.00752) of whole prompts and of one token: a state for each channel,

    h <- exp(dt A) h + dt B x        y = C h + D x, times silu(z)

in float32, 16 numbers of a state together, which stay in a register for 16 times.
"""

from typing import Any, NamedTuple

import numpy as np

from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body, parallel_for, threads_for
from hfopt.kernels.linear.activation import SILU, activate
from hfopt.kernels.simd.constants import ZERO
from hfopt.kernels.simd.functions import exp
from hfopt.kernels.simd.memory import load, load_part, load_scalar, store, store_part
from hfopt.kernels.simd.pointer import address_as, floats_at, pointer, shifted
from hfopt.kernels.simd.tile import stack_floats, sum_rows
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import absolute, fma, maximum, quotient, splat, where_part

_PARALLEL_SIZE = 1 << 15  # numbers of states that change; below, more threads cost more than they save
_TWO = np.float32(2.0)
_ATANH = tuple(np.float32(2 / n) for n in range(15, 0, -2))


@body
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log(1 + t), t = e^-|x|; log(1 + t) = 2 artanh(t / (2 + t)), by its series."""
    zero = splat(ZERO)
    t = exp(zero - absolute(x))
    s = quotient(t, t + splat(_TWO))
    square = s * s
    series = splat(_ATANH[0])
    for k in range(1, len(_ATANH)):
        series = fma(series, square, splat(_ATANH[k]))
    return fma(series, s, maximum(x, zero))


# ---- prompts -----------------------------------------------------------------------------------------------------------


class _Inputs(NamedTuple):
    """B or C: float32, `dstate` in a row."""

    first: Any  # pointer
    row: Any  # elements from one sequence to the next,
    group: Any  # from one group of channels,
    time: Any  # from one time; 0 where it is the same at all of them
    channels: Any  # of a group


@body
def _inputs_at(inputs, row, channel):
    """Pointer to what a channel of a sequence has first."""
    return shifted(inputs.first, row * inputs.row + channel // inputs.channels * inputs.group)


class _Scan(NamedTuple):
    n_channels: Any
    size: Any  # times
    dstate: Any
    a: Any  # pointers: float32 [n_channels, dstate],
    d: Any  # addresses: float32 [n_channels], or 0
    bias: Any
    z: Any  # like u, or 0
    use_softplus: Any


@body
def _scan_task(task, u, delta, b, c, scan, state, out):
    """All times of one channel of one sequence."""
    row, channel, dstate, place = (
        task // scan.n_channels,
        task % scan.n_channels,
        scan.dstate,
        task * scan.size,
    )
    a, state = shifted(scan.a, channel * dstate), shifted(state, task * dstate)
    own_b, own_c = _inputs_at(b, row, channel), _inputs_at(c, row, channel)
    bias = floats_at(scan.bias)[channel] if scan.bias != 0 else ZERO
    skip = floats_at(scan.d)[channel] if scan.d != 0 else ZERO
    steps, inputs, products = stack_floats(16), stack_floats(16), stack_floats(16 * 16)
    for first in range(0, scan.size, LANES):
        count = min(scan.size - first, LANES)
        x = load_part(u, place + first, count)
        step = load_part(delta, place + first, count) + splat(bias)
        if scan.use_softplus:
            step = softplus(step)
        store(steps, 0, step)
        store(inputs, 0, step * x)
        for n in range(0, dstate, LANES):
            lanes = min(dstate - n, LANES)
            h, rate = load_part(state, n, lanes), load_part(a, n, lanes)
            for t in range(count):
                time = first + t
                added = splat(load_scalar(inputs, t)) * load_part(own_b, time * b.time + n, lanes)
                h = fma(exp(splat(load_scalar(steps, t)) * rate), h, added)
                # an infinite step makes a NaN of the zeros behind the end
                seen = where_part(lanes, h * load_part(own_c, time * c.time + n, lanes), splat(ZERO))
                if n > 0:
                    seen = seen + load(products, t * LANES)
                store(products, t * LANES, seen)
            store_part(state, n, lanes, h)
        y = fma(splat(skip), x, sum_rows(products))
        if scan.z != 0:
            y = y * activate(load_part(address_as(scan.z, u), place + first, count), SILU)
        store_part(out, place + first, count, y)


@launch
def selective_scan(
    like, u, delta, n_rows, n_channels, size, a, dstate, b, b_steps, c, c_steps, d, z, bias, use_softplus, state, out
):  # fmt: skip
    """out = the scan of u, and the state after it in place of the one before.

    Addresses of u, delta, z (or 0) and out [n_rows, n_channels, size] of the type of `like`; float32 of a [n_channels,
    dstate], state [n_rows, n_channels, dstate], and d and bias [n_channels], or 0; of b and c, [..., dstate], whose steps
    are four: elements from a row, a group and a time to the next, and channels of a group. dt is delta + bias, or with
    use_softplus the softplus of that.
    """
    scan = _Scan(n_channels, size, dstate, floats_at(a), d, bias, z, use_softplus)
    inputs = _Inputs(floats_at(b), *b_steps), _Inputs(floats_at(c), *c_steps)
    n = n_rows * n_channels
    threads = threads_for(n, n * size * dstate, _PARALLEL_SIZE)
    pointers = address_as(u, pointer(like)), address_as(delta, pointer(like))
    arguments = *pointers, *inputs, scan, floats_at(state), address_as(out, pointer(like))
    parallel_for(_scan_task, threads, n, arguments)


# ---- one token ---------------------------------------------------------------------------------------------------------

# the arrays of `state_update`, each a row of its table: address, elements from a row, a head and a channel to the next
N_ARRAYS, FIELDS = 10, 4
STATE, X, DT, Z, OUT, A, B, C, D, BIAS = range(N_ARRAYS)


class _Update(NamedTuple):
    table: Any  # pointer to int64 [10, FIELDS]
    n_heads: Any
    group: Any  # heads that share B and C
    n_channels: Any  # of a head
    dstate: Any
    one_rate: Any  # whether A is one number for a channel
    use_softplus: Any


@body
def _array_at(update, name, like, row, head, channel):
    """Pointer to what an array has for a channel."""
    place = shifted(update.table, name * FIELDS)
    return shifted(address_as(place[0], like), row * place[1] + head * place[2] + channel * place[3])


@body
def _channels_of(update, name, like, row, head, first, count):
    """What an array has for up to 16 channels from `first` on; zeros for one that is not there."""
    if update.table[name * FIELDS] == 0:
        return splat(ZERO)
    here, step = _array_at(update, name, like, row, head, first), update.table[name * FIELDS + 3]
    if step == 1:
        return load_part(here, 0, count)
    values = stack_floats(16)
    store(values, 0, splat(ZERO))
    for j in range(count):
        values[j] = load_scalar(here, j * step)
    return load(values, 0)


@body
def _update_task(task, update, like, like_state, floats):
    """16 channels of a head."""
    n_blocks = (update.n_channels + LANES - 1) // LANES
    row, head, first = (
        task // n_blocks // update.n_heads,
        task // n_blocks % update.n_heads,
        task % n_blocks * LANES,
    )
    count, dstate = min(update.n_channels - first, LANES), update.dstate
    x = _channels_of(update, X, like, row, head, first, count)
    step = _channels_of(update, DT, like, row, head, first, count)
    step = step + _channels_of(update, BIAS, floats, row, head, first, count)
    if update.use_softplus:
        step = softplus(step)
    steps, inputs, products = stack_floats(16), stack_floats(16), stack_floats(16 * 16)
    if update.one_rate:
        step_now = exp(step * _channels_of(update, A, floats, row, head, first, count))
        store(steps, 0, step_now)
    else:
        store(steps, 0, step)
    store(inputs, 0, step * x)
    group = head // update.group
    b, c = _array_at(update, B, like, row, group, 0), _array_at(update, C, like, row, group, 0)
    for j in range(LANES):
        total = splat(ZERO)
        if j < count:
            state = _array_at(update, STATE, like_state, row, head, first + j)
            rate = _array_at(update, A, floats, row, head, first + j)
            for n in range(0, dstate, LANES):
                lanes = min(dstate - n, LANES)
                decay = splat(load_scalar(steps, j))
                if not update.one_rate:
                    decay = exp(decay * load_part(rate, n, lanes))
                h = fma(
                    decay, load_part(state, n, lanes), splat(load_scalar(inputs, j)) * load_part(b, n, lanes)
                )
                store_part(state, n, lanes, h)
                total = total + where_part(lanes, h * load_part(c, n, lanes), splat(ZERO))
        store(products, j * LANES, total)
    y = fma(_channels_of(update, D, floats, row, head, first, count), x, sum_rows(products))
    if update.table[Z * FIELDS] != 0:
        y = y * activate(_channels_of(update, Z, like, row, head, first, count), SILU)
    store_part(_array_at(update, OUT, like, row, head, first), 0, count, y)


@launch
def state_update(like, like_state, table, n_rows, n_heads, group, n_channels, dstate, one_rate, use_softplus):
    """One step of the scan for each channel of each head; see the names of the rows of `table`, int64 [10, FIELDS].

    Z, D and BIAS may be 0. Arrays of the type of `like`: X, DT, Z and OUT, the last contiguous in its channels; B and C,
    whose heads are groups of `group`, contiguous for each. Of that of `like_state`: STATE, contiguous for each channel.
    float32: A, the same, or one number for a channel if `one_rate`; D and BIAS.
    """
    update = _Update(pointer(table), n_heads, group, n_channels, dstate, one_rate, use_softplus)
    n_tasks = n_rows * n_heads * ((n_channels + LANES - 1) // LANES)
    threads = threads_for(n_tasks, n_rows * n_heads * n_channels * dstate, _PARALLEL_SIZE)
    arguments = update, pointer(like), pointer(like_state), floats_at(0)
    parallel_for(_update_task, threads, n_tasks, arguments)
