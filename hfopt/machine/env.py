"""This machine and this process: CPU path, cores, threads, memory, libraries.

Nothing here is measured and nothing is changed; `hfopt doctor` prints it, and reports carry parts of it.
"""

import contextlib
import os
import platform
import re
import time
from importlib import metadata

import torch

from hfopt.errors import KernelError
from hfopt.machine import linux

_OPENMP = re.compile(r"/lib(?:gomp|iomp5|omp)[^/]*\.so[^/]*$")


# ---- the compilation target --------------------------------------------------------------------------------


def cpu_model() -> str:
    """Name of the CPU as the kernel reports it."""
    for line in linux.text(linux.PROC / "cpuinfo").splitlines():
        if line.startswith(("model name", "Model")):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def target_cpu() -> str:
    """LLVM's name of the CPU that kernels are compiled for (`NUMBA_CPU_NAME`, or the host)."""
    from hfopt.kernels.jit import cpu

    return cpu.CPU_NAME


def features() -> frozenset[str]:
    """Instruction set features of the compilation target, in LLVM's names; not always those of the host."""
    from hfopt.kernels.jit import cpu

    return cpu.FEATURES


def cpu_path() -> str:
    """Which bodies the kernels use: 'AVX-512 BF16', 'AVX-512', 'AVX2' or 'portable'."""
    from hfopt.kernels.jit import cpu

    return cpu.PATH


def has_bfloat16_products() -> bool:
    """Whether the compilation target has instructions for products of bfloat16."""
    from hfopt.kernels.jit import cpu

    return cpu.HAS_AVX512_BF16


# ---- cores and threads -------------------------------------------------------------------------------------


def busy_cores(seconds: float = 0.5) -> float:
    """How many of the cores in the affinity mask other work keeps busy, measured while this process sleeps.

    0 where the system does not say. Its own load is a mean over a minute, in which work that has ended still counts.
    """
    before = _core_times()
    time.sleep(seconds)
    after = _core_times()
    spans = [(after[core][0] - busy, after[core][1] - total) for core, (busy, total) in before.items()]
    return sum(busy / total for busy, total in spans if total > 0)


def _core_times() -> dict[str, tuple[int, int]]:
    """(time at work, time in all) of the cores in the affinity mask, since the system was started."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    names = {f"cpu{core}" for core in allowed}
    times = {}
    for line in linux.text(linux.PROC / "stat").splitlines():
        name, *fields = line.split()
        if name in names:
            spent = [
                int(field) for field in fields[:8]
            ]  # user, nice, system, idle, iowait, irq, softirq, steal
            times[name] = sum(spent) - spent[3] - spent[4], sum(spent)
    return times


def last_level_cache() -> int:
    """Bytes of the largest CPU cache; 0 where the system does not say."""
    sizes = [linux.text(file).strip() for file in linux.CACHES.glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=0)


def threads() -> int:
    """Threads that kernels run on: as many as torch uses."""
    return torch.get_num_threads()


def threading_layer() -> str:
    """Pool that runs the kernels: "torch's OpenMP", or Numba's 'omp', 'tbb' or 'workqueue'.

    'not loaded yet' before any ran.
    """
    from hfopt.kernels.jit import launch as jit

    return jit.threading_layer() or "not loaded yet"


def openmp_copies() -> list[str]:
    """Paths of the OpenMP runtimes in this process. Each has threads of its own, and idle ones may spin."""
    maps = linux.text(linux.PROC / "self" / "maps")
    files = {line.split(maxsplit=5)[5] for line in maps.splitlines() if line.count("/")}
    return sorted(file for file in files if _OPENMP.search(file))


# ---- memory ------------------------------------------------------------------------------------------------


def _status_kb(field: str) -> int:
    status = linux.text(linux.PROC / "self" / "status")
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found.group(1)) if found else 0


def resident_memory() -> int:
    """Bytes of this process in memory now; 0 where the system does not say."""
    return _status_kb("VmRSS") * 1024


def peak_memory() -> int:
    """Largest `resident_memory` since the process began or `reset_peak_memory` was called, in bytes."""
    return _status_kb("VmHWM") * 1024


def reset_peak_memory() -> None:
    """Begin a new measurement of `peak_memory` (where the system allows it)."""
    with contextlib.suppress(OSError):
        (linux.PROC / "self" / "clear_refs").write_text("5")


def bytes_fetched() -> int:
    """Bytes that were read from disks for this process, not from pages in memory; 0 where the system does not say."""
    found = re.search(r"^read_bytes: (\d+)", linux.text(linux.PROC / "self" / "io"), re.MULTILINE)
    return int(found.group(1)) if found else 0


# ---- software ----------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in ("hfopt", "torch", "transformers", "numba", "llvmlite", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def kernel_obstacle() -> str | None:
    """Why no kernel can be loaded here, such as another release of Numba, and what helps; None if they can."""
    try:
        import hfopt.kernels  # noqa: F401
    except KernelError as error:
        return str(error)
    return None


def cache_folder() -> tuple[str | None, str]:
    """(folder of compiled kernels or None, its state in words)."""
    from hfopt.kernels.jit import launch as jit

    folder, state = jit.cache_folder()
    if folder is None:
        return None, state
    entries = [file.stat().st_size for file in folder.glob("*.nbc")]
    return str(folder), f"{state}, {len(entries)} compiled kernels, {sum(entries) / 2**20:.1f} MiB"
