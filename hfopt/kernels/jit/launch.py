"""The one door for kernels: compilation, the cache on disk, threads.

A *body* works on one tile of data and is called by other kernels; a *launch* is what Python calls: it splits the work
into tiles and runs them on the thread pool.
"""

import functools
import logging
import os
import threading
from collections.abc import Callable

import numba

from hfopt.errors import KernelError
from hfopt.kernels.jit import compiler, fork, openmp
from hfopt.kernels.jit.disk_cache import cache_folder, give_turns, keep

logger = logging.getLogger(__name__)

# NaN and Inf keep their meaning ("nnan" and "ninf" are left out); reassoc lets sums run in vector lanes.
FASTMATH = {"reassoc", "contract", "nsz", "arcp", "afn"}
OPTIONS = {"nogil": True, "fastmath": FASTMATH, "error_model": "numpy", "boundscheck": False}

compile_listeners: list[Callable[[str], None]] = []  # told the name of each launch that is compiled
_launches: "dict[Callable, Launch]" = {}  # by the functions that they were made of


def _tell_listeners(py_func: Callable) -> None:
    if py_func in _launches:
        name = py_func.__name__
        logger.info("Compiling kernel %s (once on this machine).", name)
        for listener in list(compile_listeners):
            listener(name)


compiler.tell_compilations(_tell_listeners)


# ---- threads ----------------------------------------------------------------------------------------------------------

_workqueue_lock = threading.RLock()
_layer: str | None = "torch's OpenMP" if openmp.RUNTIME else None
_threads = threading.local()


def _start_anew() -> None:
    global _workqueue_lock
    _workqueue_lock = threading.RLock()  # another thread of the parent may have held the old one
    for kernel in _launches.values():
        kernel.run = kernel.run_first


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


def threading_layer() -> str | None:
    """What runs the launches: "torch's OpenMP", or the layer that Numba loaded (None before the first launch)."""
    return _layer


def use_threads(count: int) -> None:
    """Run the launches of this Python thread on `count` threads, where the pool does not know its number itself."""
    if not openmp.RUNTIME and getattr(_threads, "count", None) != count:
        numba.set_num_threads(max(1, min(count, numba.config.NUMBA_NUM_THREADS)))
        _threads.count = count


class Launch:
    """A kernel that Python calls. A call compiles the variant for the types of its arguments, or loads it from the cache."""

    __wrapped__: Callable  # what the kernel was made of; `body` makes it callable from another launch

    def __init__(self, py_func: Callable):
        self._dispatcher = numba.njit(**OPTIONS)(py_func)
        # a decode step has hundreds of calls: what the first one has settled is not asked again
        self.run: Callable = self.run_first
        self._is_ready = False
        _launches[py_func] = self
        functools.update_wrapper(self, py_func)

    def _enable_cache(self) -> None:
        if not openmp.RUNTIME:
            numba.get_num_threads()  # loads Numba's threading layer, whose functions cached code calls by name
        folder, _ = cache_folder()
        if folder is not None:
            keep(self._dispatcher, folder)

    @property
    def dispatcher(self):
        """Numba's dispatcher, for `inspect_asm` and the like."""
        return self._dispatcher

    def __call__(self, *args):
        try:
            return self.run(*args)
        except BaseException as error:  # an interrupt of the compiler, too
            give_turns(self._dispatcher)
            if isinstance(error, numba.errors.NumbaError):
                name = self._dispatcher.__name__
                raise KernelError(f"kernel {name} cannot be compiled here: {error}") from error
            raise

    def run_first(self, *args):
        """The first call in a process; every call in one that is cut off from threads of its pool."""
        if not self._is_ready:
            self._enable_cache()
            self._is_ready = True
        if fork.is_cut_off():
            fork.check_threads()
            return self._dispatcher(*args)
        fork.note_run()
        self.run = self._dispatcher if openmp.RUNTIME else self._run_alone
        return self.run(*args)

    def _run_alone(self, *args):
        # Numba's workqueue aborts the process when two Python threads enter it, and until the first launch is over nobody
        # knows whether that is the layer
        global _layer
        with _workqueue_lock:
            result = self._dispatcher(*args)
            _layer = numba.threading_layer()
        if _layer != "workqueue":
            self.run = self._dispatcher
        return result


def launch(py_func: Callable) -> Launch:
    """Decorator of a kernel that Python calls: arrays in, arrays out."""
    return Launch(py_func)
