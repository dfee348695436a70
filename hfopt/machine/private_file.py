"""JSON files beside the compiled kernels: measurements of this machine, kept for the next process."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def path(kind: str, identity: Mapping[str, Any]) -> Path | None:
    """The file of this kind for what `identity` says; None without a kernel cache, whose folder is private."""
    from hfopt.kernels.jit import launch as jit  # here, because `import hfopt` must not load Numba

    folder, _ = jit.cache_folder()
    if folder is None:
        return None
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return folder / f"{kind}-{digest[:20]}.json"


def read(file: Path | None, identity: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The entries under `name`; None if there is no file, and, with a warning, if it is damaged or another one's."""
    if file is None or not file.exists():
        return None
    try:
        content = json.loads(file.read_text())
        if content["identity"] != identity:
            raise ValueError("it is another machine's")
        return dict(content[name])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("%s is damaged (%s): what it held is found out again.", file, error)
        return None


def write(file: Path | None, identity: Mapping[str, Any], name: str, entries: Mapping[str, Any]) -> None:
    """Keep entries, if there is a folder that can be written: the file changes at once or not at all."""
    if file is None:
        return
    try:
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f"{file.stem}-", suffix=".tmp")
        try:
            with open(handle, "w") as target:
                json.dump({"identity": identity, name: entries}, target, indent=2)
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        logger.warning("%s could not be kept: %s", file, error)
