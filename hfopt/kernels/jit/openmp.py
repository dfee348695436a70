"""The thread pool: the OpenMP runtime that the process has already, which is torch's.

A second pool, such as the one that Numba would bring along, costs dearly: the workers of either spin for milliseconds
after their last task, on the cores that the other one wants. In torch's own pool the kernels also follow
`torch.set_num_threads` without being told. Without such a runtime (another platform, no torch) Numba's threading layer
serves.

The entry points are those of GNU libgomp, which the OpenMP libraries of LLVM and Intel have on Linux as well:
`GOMP_parallel(function, data, n_threads, flags)` runs function(data) on every thread of a team.
"""

import ctypes
import re
from pathlib import Path
from typing import Any

from hfopt.kernels.jit.compiler import add_symbol

PARALLEL, TEAM, LIMIT = "hfopt_omp_parallel", "hfopt_omp_team", "hfopt_omp_limit"

_ENTRIES = {
    PARALLEL: "GOMP_parallel",
    TEAM: "omp_get_num_threads",
    LIMIT: "omp_get_max_threads",
}
_LIBRARY = re.compile(r"/lib(?:gomp|iomp5|omp)[^/]*\.so[^/]*$")


def _loaded_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes in this process, torch's own copy first."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[-1] for line in lines if _LIBRARY.search(line)}
    return sorted(paths, key=lambda path: ("/torch/" not in path, path))


def _register() -> tuple[str, ctypes.CDLL] | tuple[None, None]:
    """Makes the entry points known to compiled code; the path of the runtime and the runtime, if there is one."""
    for path in _loaded_runtimes():
        try:
            library = ctypes.CDLL(path)
            addresses = {
                name: ctypes.cast(getattr(library, entry), ctypes.c_void_p).value
                for name, entry in _ENTRIES.items()
            }
        except (OSError, AttributeError):
            continue
        for name, address in addresses.items():
            add_symbol(name, address)
        return path, library
    return None, None


_library: Any
RUNTIME, _library = _register()


def max_threads() -> int:
    """Threads of the next team of the calling thread."""
    return _library.omp_get_max_threads()


def sees_forks() -> bool:
    """Whether the runtime starts anew in a child of `fork` by itself, as LLVM's and Intel's do."""
    return hasattr(_library, "__kmpc_fork_call")


def release_threads() -> bool:
    """End the idle threads of the calling thread's pool; its next team gets new ones. Whether that could be done."""
    hard = 2  # omp_pause_hard
    return hasattr(_library, "omp_pause_resource_all") and _library.omp_pause_resource_all(hard) == 0
