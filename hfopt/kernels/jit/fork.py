"""The thread pool in a child of `fork`, which has the thread that forked and no other.

libgomp, the OpenMP of GCC, keeps idle threads for each thread that has run a team. They stay in the parent, and the child
waits for them for ever in its next team of several threads, be it torch's or ours. So a thread that forks ends its idle
threads first, where the library can do that (since GCC 9); parent and child both get new ones with their next team. The
OpenMP of LLVM and of Intel sees forks by itself, as Numba's layers `tbb` and `workqueue` do; Numba's `omp` kills a child.

Where nothing helps, the child is cut off: there kernels run on one thread, or raise ForkedProcess.
"""

import os
import threading
from pathlib import Path

import numba

from hfopt.errors import ForkedProcess
from hfopt.kernels.jit import openmp


def _is_forked() -> bool:
    """Whether this process was forked and has not called `exec` since (PF_FORKNOEXEC in Linux's flags of a process)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return bool(int(fields[6]) & 0x40)


_ran = False
# threads of the pool may be missing already: told to end them, libgomp would wait for them too
_may_lack = _is_forked()
_is_prepared = False  # the thread that forks now has ended its idle threads
_cut_off: int | None = None  # in a child whose pool lacks threads: the thread that came from the parent


def note_run() -> None:
    """A kernel runs in this process."""
    global _ran
    _ran = True


def is_cut_off() -> bool:
    """Whether the pool lacks its threads."""
    return _cut_off is not None


def check_threads() -> None:
    """Raise ForkedProcess if a kernel that this thread calls now would need threads that are missing."""
    if openmp.RUNTIME:
        # threads that the child has started have pools of their own
        is_missing = threading.get_ident() == _cut_off and openmp.max_threads() > 1
    else:
        is_missing = numba.get_num_threads() > 1
    if is_missing:
        raise ForkedProcess(
            "This process was forked after hfopt had run kernels, and the threads of the pool do not exist here: "
            f"{openmp.RUNTIME or 'the OpenMP of Numba'} cannot start new ones in a forked process. Call "
            "torch.set_num_threads(1) here (or set OMP_NUM_THREADS=1 before the parent starts), start workers with the "
            "'spawn' method, or fork before the first call of hfopt.optimize."
        )


def _starts_anew() -> bool:
    """Whether the pool sees by itself that it is in a child."""
    if openmp.RUNTIME:
        return openmp.sees_forks()
    try:
        return numba.threading_layer() != "omp"
    except ValueError:  # no layer is loaded
        return True


def _before() -> None:
    global _is_prepared
    if openmp.RUNTIME and not openmp.sees_forks() and not _may_lack:
        _is_prepared = openmp.release_threads()


def _after_in_parent() -> None:
    global _is_prepared
    _is_prepared = False


def _after_in_child() -> None:
    # a server that is written in C may fork without a word before: nothing is prepared then
    global _is_prepared, _may_lack, _cut_off
    _may_lack = not (_is_prepared or _starts_anew())
    _cut_off = threading.get_ident() if _ran and _may_lack else None
    _is_prepared = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
