"""The releases of Numba that the kernels are written for."""

from importlib import metadata

from packaging.specifiers import SpecifierSet

# Kernels reach into Numba's compiler (jit/compiler.py, jit/disk_cache.py): a new release is let in, here and in
# pyproject.toml, when the tests have passed with it.
RANGE = ">=0.68,<0.69"


def obstacle() -> str | None:
    """What is wrong with the installed Numba and how to mend it; None if the kernels are written for it."""
    advice = f'hfopt\'s kernels are written for numba{RANGE}: pip install "numba{RANGE}"'
    try:
        installed = metadata.version("numba")
    except metadata.PackageNotFoundError:
        return f"numba is not installed; {advice}"
    if SpecifierSet(RANGE).contains(installed, prereleases=True):
        return None
    return f"numba {installed} is installed; {advice}"
