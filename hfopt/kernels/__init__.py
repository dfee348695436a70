"""Arrays in, arrays out: the kernels, compiled by Numba. Importing any of them raises KernelError where Numba is not fit."""

from hfopt.errors import KernelError
from hfopt.kernels import release

# before Numba is loaded: another release may fail in ways that say nothing
_obstacle = release.obstacle()
if _obstacle is not None:
    raise KernelError(_obstacle)
try:
    import numba  # noqa: F401
except ImportError as error:  # it refuses releases of Python, NumPy and llvmlite that it does not know
    raise KernelError(f"numba, which compiles the kernels, cannot be loaded: {error}") from error
