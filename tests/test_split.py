"""How work is dealt out to threads: every index once, and no thread idle for long at the end."""

import heapq

import numpy as np
import pytest

from hfopt.kernels.jit.launch import launch
from hfopt.kernels.jit.parallel import body, next_share, parallel_for
from hfopt.kernels.linear import panels
from hfopt.kernels.simd.pointer import pointer

THREADS = [1, 2, 3, 4, 7, 8, 16, 31, 64, 127, 128]


@launch
def _shares(counter, total, n_threads, firsts):
    """First index of each share, in the order in which they are taken; their number."""
    n = 0
    while True:
        first, end = next_share(pointer(counter), total, n_threads)
        if first == end:
            return n
        firsts[n] = first
        n += 1


@launch
def _split(n_tiles, n_panels, n_threads):
    return panels.split_tiles(n_tiles, n_panels, n_threads)


@body
def _count(index, counts):
    counts[index] += 1


@launch
def _run(n, n_threads, counts):
    parallel_for(_count, n_threads, n, (counts,))


def _sizes(total: int, n_threads: int) -> list[int]:
    firsts = np.empty(total + 1, np.int64)
    n = _shares(np.zeros(1, np.int64), total, n_threads, firsts)
    assert firsts[0] == 0 if n else total == 0
    sizes = np.diff([*firsts[:n], total])
    assert (sizes > 0).all()
    return sizes.tolist()


def _finished(sizes: list[int], n_threads: int) -> int:
    """When the last of equally fast threads is done, each of which takes the next share as soon as it is free."""
    free = [0] * n_threads
    for size in sizes:
        heapq.heappush(free, heapq.heappop(free) + size)
    return max(free)


@pytest.mark.parametrize("total", [0, 1, 2, 3, 17, 64, 1000, 8016])
def test_shares_leave_no_thread_idle(total: int) -> None:
    for n_threads in range(1, 129):
        sizes = _sizes(total, n_threads)
        assert sum(sizes) == total
        assert sizes == sorted(sizes, reverse=True)
        # no thread waits for another longer than one index takes
        assert _finished(sizes, n_threads) <= -(-total // n_threads) + 1


@pytest.mark.parametrize("n_panels", [1, 4, 16, 63, 64, 256, 4008])
@pytest.mark.parametrize("n_tiles", [3, 10, 37, 147])
def test_tiles_are_split_finely_enough(n_tiles: int, n_panels: int) -> None:
    for n_threads in range(1, 129):
        group, n_parts = _split(n_tiles, n_panels, n_threads)
        assert 1 <= group <= panels.PANELS and 1 <= n_parts <= n_tiles
        n_groups = -(-n_panels // group)
        # work of an item at most: a group of panels and the largest part of the tiles
        largest = group * -(-n_tiles // n_parts)
        busy = _finished(_sizes(n_groups * n_parts, n_threads), n_threads) * largest
        smallest_possible = n_panels * n_tiles / n_threads
        few = n_panels * n_tiles < 8 * n_threads  # hardly more tiles than threads
        assert busy <= (2 if few else 1.5) * smallest_possible + largest


@pytest.mark.parametrize("n", [0, 1, 2, 15, 1000])
@pytest.mark.parametrize("n_threads", THREADS)
def test_every_index_runs_once(n: int, n_threads: int) -> None:
    counts = np.zeros(n + 1, np.int64)
    _run(n, n_threads, counts)
    assert counts.tolist() == [1] * n + [0]
