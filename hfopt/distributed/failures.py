"""Why a collective has failed, in words."""

from collections.abc import Sequence

from hfopt.distributed.segment import Segment
from hfopt.kernels.shared import member as layout
from hfopt.words import counted

_OPERATIONS = {
    0: "nothing",
    layout.BARRIER: "barrier",
    layout.ALL_REDUCE: "all_reduce",
    layout.ALL_GATHER: "all_gather",
    layout.BROADCAST: "broadcast",
    layout.ARG_MAX: "arg_max",
}
_ELEMENTS = {layout.FLOAT32: "float32", layout.BFLOAT16: "bfloat16", layout.FLOAT16: "float16"}
_REASONS = {
    layout.ENDED: "has seen that another one has ended",
    layout.INTERRUPTED: "was interrupted, or had an error",
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
    calls = _last_calls(segment, own, len(processes))
    for other, call in calls.items():
        first, its = next(iter(calls.items()))
        if call != its:
            return f"rank {other} called {_in_words(call)}, rank {first} {_in_words(its)}"
    waited = f" rank {own} waited for it in {_in_words(calls[own])}" if own in calls else ""
    reason, failed = segment.failure()
    if kind == layout.FAILED and (reason in (layout.INTERRUPTED, layout.LEFT) or not ended):
        return f"{_named(failed, processes)} {_REASONS[reason]}:{waited}".rstrip(":")
    if ended:
        return f"{_named(ended[0], processes)} has ended:{waited}".rstrip(":")
    return f"{_named(rank, processes)} did not come within {limit:g} s:{waited}".rstrip(":")


def _named(rank: int, processes: Sequence[int]) -> str:
    return f"rank {rank} (pid {processes[rank]})"


def _last_calls(segment: Segment, own: int, size: int) -> dict[int, int]:
    """What the ranks have called, those that are ahead of the others alone: this one first, if it is."""
    sequences = {rank: int(segment.rank_words(rank)[0]) for rank in (own, *range(size))}
    last = max(sequences.values())
    return {
        rank: int(segment.rank_words(rank)[layout.WHAT + (last & 1)])
        for rank, sequence in sequences.items()
        if sequence == last
    }


def _in_words(what: int) -> str:
    operation, elements, n = what & 0xFF, what >> 8 & 0xFF, what >> 16
    name = _OPERATIONS[operation]
    if operation == layout.BARRIER:
        return name
    if operation == layout.ARG_MAX:
        return f"{name} of {counted(n, 'row')}"
    return f"{name} of {n} {_ELEMENTS.get(elements, 'bytes')}"
