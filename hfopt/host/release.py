"""Which releases of transformers hfopt runs with."""

from importlib import metadata

from packaging.version import Version

OLDEST = "4.57.6"


def installed() -> str:
    """The installed release, as its package says it."""
    return metadata.version("transformers")


def check_release() -> None:
    """Raises ImportError where the installed release is older than the oldest that hfopt is tested with."""
    if Version(installed()) < Version(OLDEST):
        raise ImportError(
            f"hfopt needs transformers {OLDEST} or newer, and {installed()} is installed: "
            "pip install --upgrade transformers"
        )
