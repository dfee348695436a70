"""The one door for compilation: flags, the kernel cache on disk, threads.

A *body* works on one tile of data and is called by other kernels; a *launch* is what Python calls: it splits the work
into tiles and runs them on the thread pool.
"""

import functools
import hashlib
import logging
import os
import pickle
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import llvmlite
import numba
from numba.core import event
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile, _CacheLocator
from numba.core.errors import NumbaError

from ..errors import ForkedProcess, KernelError
from . import _openmp, _target

logger = logging.getLogger(__name__)

# NaN and Inf keep their meaning ("nnan" and "ninf" are left out); reassoc lets sums run in vector lanes.
FASTMATH = {"reassoc", "contract", "nsz", "arcp", "afn"}
OPTIONS = {"nogil": True, "fastmath": FASTMATH, "error_model": "numpy", "boundscheck": False}


# ---- the cache folder -------------------------------------------------------------------------------------------------


def _content_key() -> str:
    """Hash of everything that machine code depends on and Numba's own key leaves out."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    versions = (numba.__version__, llvmlite.__version__, _target.LLVM_VERSION, sys.version_info[:3])
    digest.update(
        repr(
            (versions, _target.CPU_NAME, sorted(_target.FEATURES), sorted(FASTMATH), bool(_openmp.RUNTIME))
        ).encode()
    )
    return digest.hexdigest()[:20]


def _trusted(folder: Path) -> str | None:
    """Why code must not be loaded from this folder, or None. Cache entries are pickles: who can write them runs code."""
    try:
        status = folder.lstat()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not stat.S_ISDIR(status.st_mode):
        return "is not a folder (links are not followed)"
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        return f"belongs to user {status.st_uid}"
    if stat.S_IMODE(status.st_mode) & 0o022 and os.name == "posix":
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    if not os.access(folder, os.W_OK):
        return "cannot be written"
    return None


def _base_folder() -> Path:
    chosen = os.environ.get("HFOPT_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hfopt"


@functools.lru_cache(maxsize=1)
def cache_folder() -> tuple[Path | None, str]:
    """(folder of compiled kernels or None, why). `HFOPT_CACHE_DIR` names another base folder, or is `off`."""
    if os.environ.get("HFOPT_CACHE_DIR", "").lower() == "off":
        return None, "switched off by HFOPT_CACHE_DIR"
    base = _base_folder()
    folder = base / _content_key()
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        reason = f"{folder} cannot be made ({error.strerror})"
        logger.warning("Kernels are compiled anew in every process: %s.", reason)
        return None, reason
    for candidate in (base, folder):
        doubt = _trusted(candidate)
        if doubt is not None:
            logger.warning("Kernels are compiled anew in every process: %s %s.", candidate, doubt)
            return None, f"{candidate} {doubt}"
    return folder, "in use"


class _PrivateLocator(_CacheLocator):
    """Puts every entry into the private folder; its name already stands for the sources, so no other stamp is kept."""

    def __init__(self, py_func, folder: Path):
        self._py_file = py_func.__code__.co_filename
        self._folder = folder

    def get_cache_path(self):
        return str(self._folder)

    def get_source_stamp(self):
        return self._folder.name

    def get_disambiguator(self):
        return "hfopt"


class _PrivateCacheImpl(CompileResultCacheImpl):
    def __init__(self, py_func, folder: Path):
        self._lineno = py_func.__code__.co_firstlineno
        self._locator = _PrivateLocator(py_func, folder)
        name = f"{py_func.__module__.rpartition('.')[2]}.{py_func.__qualname__}"
        self._filename_base = self.get_filename_base(name, getattr(sys, "abiflags", ""))


class _ChecksummedFile(IndexDataCacheFile):
    """Index and data files in which the machine code carries its SHA-256: damaged code is never run."""

    def _save_data(self, name, data):
        payload = self._dump(data)
        with self._open_for_write(self._data_path(name)) as file:
            file.write(hashlib.sha256(payload).digest() + payload)

    def _load_data(self, name):
        content = Path(self._data_path(name)).read_bytes()
        digest, payload = content[:32], content[32:]
        if hashlib.sha256(payload).digest() != digest:
            raise ValueError("its checksum is wrong")
        return pickle.loads(payload)


class _PrivateCache(FunctionCache):
    """Numba's function cache in the private folder. A damaged entry is compiled again instead of raising."""

    def __init__(self, py_func, folder: Path):
        self._name = repr(py_func)
        self._py_func = py_func
        self._impl = _PrivateCacheImpl(py_func, folder)
        self._cache_path = str(folder)
        self._cache_file = _ChecksummedFile(self._cache_path, self._impl.filename_base, folder.name)
        self.enable()

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # noqa: BLE001 (a damaged pickle raises nearly anything)
            logger.warning("Cached kernel %s is damaged (%s); compiling it again.", self._name, error)
            self.flush()
            return None

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except OSError as error:
            logger.warning("Kernel %s could not be cached: %s", self._name, error)


compile_listeners: list[Callable[[str], None]] = []
_launches: "dict[Callable, Launch]" = {}  # by the functions that they were made of


class _CompileListener(event.Listener):
    """Tells `compile_listeners` the name of each launch that Numba starts to compile."""

    def on_start(self, event):
        py_func = event.data["dispatcher"].py_func
        if py_func in _launches:
            name = py_func.__name__
            logger.info("Compiling kernel %s (once on this machine).", name)
            for listener in list(compile_listeners):
                listener(name)

    def on_end(self, event):
        pass


event.register("numba:compile", _CompileListener())


# ---- threads ----------------------------------------------------------------------------------------------------------

_ran = False
_forked = False
_workqueue_lock = threading.RLock()
_layer: str | None = "torch's OpenMP" if _openmp.RUNTIME else None
_threads = threading.local()


def _mark_forked() -> None:
    # the workers of OpenMP stay behind in the parent, and a team waits for them for ever; other layers start anew
    global _forked
    _forked = _ran and _layer in ("omp", "torch's OpenMP")
    for kernel in _launches.values():
        kernel.run = kernel.run_first


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)


def threading_layer() -> str | None:
    """What runs the launches: "torch's OpenMP", or the layer that Numba loaded (None before the first launch)."""
    return _layer


def use_threads(count: int) -> None:
    """Run the launches of this Python thread on `count` threads, where the pool does not know its number itself."""
    if not _openmp.RUNTIME and getattr(_threads, "count", None) != count:
        numba.set_num_threads(max(1, min(count, numba.config.NUMBA_NUM_THREADS)))
        _threads.count = count


class Launch:
    """A kernel that Python calls. A call compiles the variant for the types of its arguments, or loads it from the cache."""

    __wrapped__: Callable  # what the kernel was made of; `body` makes it callable from another launch

    def __init__(self, py_func: Callable):
        self._dispatcher = numba.njit(**OPTIONS)(py_func)
        # a decode step has hundreds of calls: what the first one has settled is not asked again
        self.run: Callable = self.run_first
        _launches[py_func] = self
        functools.update_wrapper(self, py_func)

    def _enable_cache(self) -> None:
        if not _openmp.RUNTIME:
            numba.get_num_threads()  # loads Numba's threading layer, whose functions cached code calls by name
        folder, _ = cache_folder()
        if folder is not None:
            self._dispatcher._cache = _PrivateCache(self._dispatcher.py_func, folder)

    @property
    def dispatcher(self):
        """Numba's dispatcher, for `inspect_asm` and the like."""
        return self._dispatcher

    def __call__(self, *args):
        try:
            return self.run(*args)
        except NumbaError as error:
            raise KernelError(
                f"kernel {self._dispatcher.__name__} cannot be compiled here: {error}"
            ) from error

    def run_first(self, *args):
        """The first call in a process."""
        global _ran
        if _forked:
            raise ForkedProcess(
                "This process was forked after hfopt had run kernels, so the kernels' threads do not exist here. "
                "Start workers with the 'spawn' method, or fork before the first call of hfopt.optimize."
            )
        _ran = True
        self._enable_cache()
        self.run = self._dispatcher if _openmp.RUNTIME else self._run_alone
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
