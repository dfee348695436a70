"""Arrays in, arrays out: the kernels, compiled by Numba. Importing any of them raises KernelError where Numba is not fit."""

from .. import _numba
from ..errors import KernelError

# before Numba is loaded: another release may fail in ways that say nothing
_obstacle = _numba.obstacle()
if _obstacle is not None:
    raise KernelError(_obstacle)
try:
    import numba  # noqa: F401
except ImportError as error:  # it refuses releases of Python, NumPy and llvmlite that it does not know
    raise KernelError(f"numba, which compiles the kernels, cannot be loaded: {error}") from error
