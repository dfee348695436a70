"""Compiled kernels on disk: one private folder for each state of the sources, of Numba and of the machine.

Touches the insides of Numba, which may change any of it in the next release (`compiler` has the rest):

    numba.core.caching   _CacheLocator: get_cache_path, get_source_stamp, get_disambiguator, _py_file
                         CompileResultCacheImpl: get_filename_base, filename_base, _lineno, _locator, _filename_base
                         IndexDataCacheFile: _save_data, _load_data, _dump, _open_for_write, _data_path
                         FunctionCache: enable, flush, load_overload, save_overload, _name, _py_func, _impl, _cache_path,
                         _cache_file
    dispatchers          _cache
"""

import functools
import hashlib
import logging
import os
import pickle
import stat
import sys
from pathlib import Path

import llvmlite
import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile, _CacheLocator

from hfopt.kernels.jit import cpu, openmp
from hfopt.kernels.jit.turn import Turn

logger = logging.getLogger(__name__)


def _content_key() -> str:
    """Hash of everything that machine code depends on and Numba's own key leaves out."""
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for source in sorted(package.rglob("*.py")):
        digest.update(source.relative_to(package).as_posix().encode() + source.read_bytes())
    versions = (numba.__version__, llvmlite.__version__, cpu.LLVM_VERSION, sys.version_info[:3])
    target = (cpu.CPU_NAME, sorted(cpu.FEATURES), cpu.HAS_AMX_BF16, bool(openmp.RUNTIME))
    digest.update(repr((versions, target)).encode())
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


# ---- Numba's function cache in it -------------------------------------------------------------------------------------


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
        name = f"{py_func.__module__}.{py_func.__qualname__}"
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
    """Numba's function cache in the private folder. A damaged entry is compiled again instead of raising.

    Of several processes that miss an entry, one compiles it and the others wait. They write one by one: Numba's own would
    give entries of two signatures the same file.
    """

    def __init__(self, py_func, folder: Path):
        self._name = repr(py_func)
        self._py_func = py_func
        self._impl = _PrivateCacheImpl(py_func, folder)
        self._cache_path = str(folder)
        self._cache_file = _ChecksummedFile(self._cache_path, self._impl.filename_base, folder.name)
        self.turns: dict[str, Turn] = {}  # to compile a signature
        self.enable()

    def load_overload(self, sig, target_context):
        mine = self.turns.setdefault(str(sig), _turn(self, str(sig)))
        for turn in (None, mine):
            if turn is not None:
                turn.take()
            try:
                found = super().load_overload(sig, target_context)
            except Exception as error:  # noqa: BLE001 (a damaged pickle raises nearly anything)
                logger.warning("Cached kernel %s is damaged (%s); compiling it again.", self._name, error)
                self.flush()
                found = None
            if found is not None:
                mine.give()
                return found
        return None

    def save_overload(self, sig, data):
        try:
            with _turn(self, "index"):
                super().save_overload(sig, data)
        except OSError as error:
            logger.warning("Kernel %s could not be cached: %s", self._name, error)
        finally:
            turn = self.turns.pop(str(sig), None)
            if turn is not None:
                turn.give()


def _turn(cache: _PrivateCache, name: str) -> Turn:
    """Of a kernel: to compile a signature, or to write."""
    digest = hashlib.sha256(f"{cache._impl.filename_base} {name}".encode()).hexdigest()
    return Turn(Path(cache._cache_path, f"{digest[:20]}.lock"))


def give_turns(dispatcher) -> None:
    """Let other processes compile what this one has begun and not ended."""
    turns = getattr(dispatcher._cache, "turns", {})
    while turns:
        turns.popitem()[1].give()


def keep(dispatcher, folder: Path) -> None:
    """From now on, what this dispatcher compiles is kept in the folder, and loaded from it."""
    dispatcher._cache = _PrivateCache(dispatcher.py_func, folder)
