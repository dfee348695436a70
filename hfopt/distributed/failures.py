"""Why a collective has failed, in words."""

from collections.abc import Sequence

from hfopt.distributed.segment import Segment
from hfopt.kernels.shared import member as layout
from hfopt.words import counted

_OPERATIONS = {
    layout.BARRIER: "barrier",
    layout.ALL_REDUCE: "all_reduce",
    layout.ALL_GATHER: "all_gather",
    layout.BROADCAST: "broadcast",
    layout.ARG_MAX: "arg_max",
}
_ELEMENTS = {layout.FLOAT32: "float32", layout.BFLOAT16: "bfloat16", layout.FLOAT16: "float16"}
_REASONS = {
    layout.ENDED: "has seen that another one has ended",
    layout.INTERRUPTED: "was interrupted, or had an error,",
    layout.GIVEN_UP: "has given up",
    layout.LEFT: "has closed the group",
}


def failure_in_words(
    segment: Segment, own: int, processes: Sequence[int], status: int, ended: Sequence[int], limit: float
) -> str:
    """A message that names ranks: for a status of a body, and ranks whose processes have ended.

    own: rank of this process. processes: numbers of those of the ranks. limit: seconds.
    """
    kind, rank = status & 0xFF, status >> 8
    called = _call_in_words(segment, own)
    different = next((r for r in range(len(processes)) if _differs(segment, own, r)), None)
    if kind == layout.DIFFERENT or different is not None:
        other = rank if kind == layout.DIFFERENT else different
        assert other is not None
        return f"rank {other} called {_call_in_words(segment, other, own)}, rank {own} {called}"
    reason, failed = segment.failure()
    if kind == layout.FAILED and (reason in (layout.INTERRUPTED, layout.LEFT) or not ended):
        return f"{_named(failed, processes)} {_REASONS[reason]} while rank {own} waited in {called}"
    if ended:
        return f"{_named(ended[0], processes)} has ended: rank {own} waited for it in {called}"
    return f"{_named(rank, processes)} did not come within {limit:g} s: rank {own} waited for it in {called}"


def _named(rank: int, processes: Sequence[int]) -> str:
    return f"rank {rank} (pid {processes[rank]})"


def _what(segment: Segment, rank: int, sequence: int) -> int:
    return int(segment.rank_words(rank)[layout.WHAT + (sequence & 1)])


def _differs(segment: Segment, own: int, rank: int) -> bool:
    """Whether a rank has come, but to something else."""
    sequence = int(segment.rank_words(own)[0])
    has_come = int(segment.rank_words(rank)[0]) >= sequence
    return has_come and _what(segment, rank, sequence) != _what(segment, own, sequence)


def _call_in_words(segment: Segment, rank: int, own: int | None = None) -> str:
    """What a rank has called, where `own` is now."""
    sequence = int(segment.rank_words(rank if own is None else own)[0])
    what = _what(segment, rank, sequence)
    operation, elements, n = what & 0xFF, what >> 8 & 0xFF, what >> 16
    name = _OPERATIONS.get(operation, "an unknown operation")
    if operation == layout.BARRIER:
        return name
    if operation == layout.ARG_MAX:
        return f"{name} of {counted(n, 'row')}"
    return f"{name} of {n} {_ELEMENTS.get(elements, 'bytes')}"
