"""The machine that kernels are compiled for.

An LLVM intrinsic for an instruction that the *compilation target* lacks makes LLVM abort the process, so features are
read from Numba's target settings (`NUMBA_CPU_NAME`, `NUMBA_CPU_FEATURES`), and from the host only where those are unset.
"""

import ctypes
import platform
import sys

from numba import config

from hfopt.kernels.jit.compiler import get_host_cpu_features, get_host_cpu_name, llvm_version_info

LLVM_VERSION: tuple[int, ...] = tuple(llvm_version_info)


def _target_features() -> frozenset[str]:
    if config.CPU_FEATURES is not None:
        listed = config.CPU_FEATURES.split(",")
        return frozenset(name.strip()[1:] for name in listed if name.strip().startswith("+"))
    if config.CPU_NAME not in (None, "", "host"):
        return frozenset()
    return frozenset(name for name, present in get_host_cpu_features().items() if present)


_REQUEST_STATE, _TILE_DATA = 0x1023, 18  # ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
_ARCH_PRCTL = 158  # its number on x86-64


def _may_use_tiles() -> bool:
    """Whether the system lets this process, and its threads, use AMX: Linux gives the registers to those that ask.

    https://docs.kernel.org/arch/x86/xstate.html
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA) == 0)


FEATURES = _target_features()
CPU_NAME: str = config.CPU_NAME or get_host_cpu_name()
HAS_AVX512_BF16 = {"avx512f", "avx512bf16"} <= FEATURES
HAS_AVX512_BW = {"avx512f", "avx512bw"} <= FEATURES
HAS_AVX512_VNNI = {"avx512f", "avx512vnni"} <= FEATURES
HAS_AMX_BF16 = {"amx-tile", "amx-bf16"} <= FEATURES and HAS_AVX512_BF16 and _may_use_tiles()
HAS_AVX2 = HAS_AVX512_BW or "avx2" in FEATURES
# conversions of float16; ARMv8 has them in any case
HAS_FLOAT16 = "f16c" in FEATURES or "avx512f" in FEATURES or platform.machine() in ("arm64", "aarch64")
HAS_AVX_VNNI = "avxvnni" in FEATURES or {"avx512vl", "avx512vnni"} <= FEATURES  # of 32 bytes

if HAS_AMX_BF16:
    PATH = "AMX BF16"
elif HAS_AVX512_BF16:
    PATH = "AVX-512 BF16"
elif "avx512f" in FEATURES:
    PATH = "AVX-512"
elif {"avx2", "fma"} <= FEATURES:
    PATH = "AVX2"
else:
    PATH = "portable"
