"""Causal convolutions of each channel by itself, over a prompt or a few new tokens with a state. Sums are float32."""

from typing import Any, NamedTuple

from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body, parallel_for, threads_for
from hfopt.kernels.linear.activation import activate
from hfopt.kernels.simd.constants import ZERO
from hfopt.kernels.simd.memory import load, load_part, load_scalar, store, store_part, store_scalar
from hfopt.kernels.simd.pointer import address_as, floats_at, pointer, shifted
from hfopt.kernels.simd.tile import stack_floats, sum_rows
from hfopt.kernels.simd.types import LANES
from hfopt.kernels.simd.vector import fma, lane, splat, where_part

_PARALLEL_SIZE = 1 << 15  # multiply-adds; below, more threads cost more than they save
_PARALLEL_UPDATE = 1 << 14  # those of an update are one by one


class _Filter(NamedTuple):
    """What becomes of `width` inputs in a row."""

    weight: Any  # pointer to [channels, width]
    bias: Any  # address, or 0
    width: Any
    code: Any  # from `activation`


# ---- prompts -----------------------------------------------------------------------------------------------------------


@body
def _conv_task(row, x, history, n_channels, size, filter, out):
    """One channel of one sequence: 16 times together, but the first ones, which reach into the history."""
    width, channel = filter.width, row % n_channels
    before = width - 1
    weight, bias = shifted(filter.weight, channel * width), ZERO
    if filter.bias != 0:
        bias = load_scalar(address_as(filter.bias, filter.weight), channel)
    x, out = shifted(x, row * size), shifted(out, row * size)
    head = min(before, size)
    for t in range(head):
        total = bias
        for w in range(width):
            place = t + w - before
            if place >= 0:
                total += load_scalar(weight, w) * load_scalar(x, place)
            elif history != 0:
                total += load_scalar(weight, w) * load_scalar(floats_at(history), row * before + t + w)
        store_scalar(out, t, lane(activate(splat(total), filter.code), 0))
    t = head
    while t + LANES <= size:
        total = splat(bias)
        for w in range(width):
            total = fma(splat(load_scalar(weight, w)), load(x, t + w - before), total)
        store(out, t, activate(total, filter.code))
        t += LANES
    if t < size:
        total = splat(bias)
        for w in range(width):
            total = fma(splat(load_scalar(weight, w)), load_part(x, t + w - before, size - t), total)
        store_part(out, t, size - t, activate(total, filter.code))


@launch
def causal_conv(like, like_weight, x, history, n_rows, n_channels, size, weight, bias, width, code, out):
    """out[t] = activation(bias + sum over w of weight[w] x[t + w - (width - 1)]) for each channel.

    Addresses of x and out [n_rows, n_channels, size] of the type of `like`; of weight [n_channels, width] and bias
    [n_channels], or 0, of that of `like_weight`; of history float32 [n_rows, n_channels, width - 1], what comes before x, or
    0 where that is zeros. code: from `activation`.
    """
    filter = _Filter(address_as(weight, pointer(like_weight)), bias, width, code)
    x, out = address_as(x, pointer(like)), address_as(out, pointer(like))
    n = n_rows * n_channels
    threads = threads_for(n, n * size * width, _PARALLEL_SIZE)
    parallel_for(_conv_task, threads, n, (x, history, n_channels, size, filter, out))


# ---- new tokens --------------------------------------------------------------------------------------------------------


class _Steps(NamedTuple):
    """An array [rows, channels, times]: pointer, and elements from one to the next."""

    first: Any
    row: Any
    channel: Any
    time: Any


@body
def _update_state(x, state, x_time, state_time, n_new, size, start, circular):
    """Lets the state [size] of a channel take its n_new new inputs."""
    if circular:
        first = max(n_new - size, 0)
        place = (start + first) % size
        for t in range(first, n_new):
            store_scalar(state, place * state_time, load_scalar(x, t * x_time))
            place = place + 1 if place + 1 < size else 0
    else:
        kept = max(size - n_new, 0)
        for place in range(kept):
            store_scalar(state, place * state_time, load_scalar(state, (place + n_new) * state_time))
        for place in range(kept, size):
            store_scalar(state, place * state_time, load_scalar(x, (place + n_new - size) * x_time))


@body
def _sum_of(x, x_step, t, state, state_step, size, oldest, held, weight, width):
    """Products of input number t of a channel and those before it, `held` of which begin at `oldest` in a state."""
    total, place = ZERO, oldest
    for w in range(held):
        total += load_scalar(weight, w) * load_scalar(state, place * state_step)
        place = place + 1 if place + 1 < size else 0
    x = shifted(x, (t - width + 1) * x_step)
    for w in range(held, width):
        total += load_scalar(weight, w) * load_scalar(x, w * x_step)
    return total


@body
def _take_one(x, x_step, state, state_step, size, weight, width, count, products):
    """Products of one new input of `count` channels and those before it, in lanes; their states, contiguous, take it up.

    None is stored before all are read: what a store of a part of a vector may reach cannot be read until it is over.
    """
    after = stack_floats(16 * 16)
    for j in range(count):
        own, value = shifted(state, j * state_step), splat(load_scalar(x, j * x_step))
        seen = where_part(width, value, splat(ZERO))
        seen = where_part(width - 1, load_part(own, size - width + 1, width - 1), seen)
        store(products, j * LANES, seen * load_part(weight, j * width, width))
        store(after, j * LANES, where_part(size - 1, load_part(own, 1, size - 1), value))
    for j in range(count):
        store_part(state, j * state_step, size, load(after, j * LANES))


@body
def _update_task(task, xs, states, n_channels, n_new, size, starts, circular, filter, out):
    """16 channels of one row."""
    n_blocks = (n_channels + LANES - 1) // LANES
    row, first = task // n_blocks, task % n_blocks * LANES
    count, width = min(n_channels - first, LANES), filter.width
    x = shifted(xs.first, row * xs.row + first * xs.channel)
    state = shifted(states.first, row * states.row + first * states.channel)
    out, weight = shifted(out, (row * n_channels + first) * n_new), shifted(filter.weight, first * width)
    bias = splat(ZERO)
    if filter.bias != 0:
        bias = load_part(address_as(filter.bias, filter.weight), first, count)
    if n_new == 1 and not circular and states.time == 1 and 0 < size <= LANES:
        products = stack_floats(16 * 16)
        _take_one(x, xs.channel, state, states.channel, size, weight, width, count, products)
        store_part(out, 0, count, activate(sum_rows(products) + bias, filter.code))
        return
    start, sums = starts[row] if circular else 0, stack_floats(16)
    for t in range(n_new):
        held = max(width - 1 - t, 0)
        oldest = start - held if start >= held else start - held + size
        for j in range(count):
            own_x, own_state = shifted(x, j * xs.channel), shifted(state, j * states.channel)
            own = shifted(weight, j * width)
            sums[j] = _sum_of(own_x, xs.time, t, own_state, states.time, size, oldest, held, own, width)
        store(sums, 0, activate(load_part(sums, 0, count) + bias, filter.code))
        for j in range(count):
            store_scalar(out, j * n_new + t, sums[j])
    for j in range(count):
        own_x, own_state = shifted(x, j * xs.channel), shifted(state, j * states.channel)
        _update_state(own_x, own_state, xs.time, states.time, n_new, size, start, circular)


@launch
def causal_conv_update(
    like,
    like_state,
    like_weight,
    x,
    x_steps,
    n_rows,
    n_channels,
    n_new,
    state,
    state_steps,
    size,
    starts,
    weight,
    bias,
    width,
    code,
    out,
):
    """`causal_conv` for n_new inputs, after those in a state, which takes them up.

    Address of x [n_rows, n_channels, n_new] of the type of `like`; of the state [n_rows, n_channels, size], of that of
    `like_state`, which has at least the last width - 1 inputs, and as many as it holds afterwards; steps are three, elements
    from a row, a channel and a time to the next. starts: int64 [n_rows], where in the state the next input goes, below size,
    if it is a circular buffer; empty if its last inputs are at its end. Weight, bias, code: as in `causal_conv`; address of
    out [n_rows, n_channels, n_new] of the type of `like`.
    """
    filter = _Filter(address_as(weight, pointer(like_weight)), bias, width, code)
    xs, states = (
        _Steps(address_as(x, pointer(like)), *x_steps),
        _Steps(address_as(state, pointer(like_state)), *state_steps),
    )
    circular = starts.shape[0] > 0 and size > 0
    n_tasks = n_rows * ((n_channels + LANES - 1) // LANES)
    threads = threads_for(n_tasks, n_rows * n_channels * n_new * width, _PARALLEL_UPDATE)
    arguments = xs, states, n_channels, n_new, size, pointer(starts), circular, filter
    parallel_for(_update_task, threads, n_tasks, (*arguments, address_as(out, pointer(like))))
