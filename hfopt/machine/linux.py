"""Files in which Linux describes this process and its machine. Other systems have none of them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
PROC = Path("/proc")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def text(file: Path) -> str:
    """Content of a file, "" if it cannot be read."""
    try:
        return file.read_text()
    except OSError:
        return ""


def control_groups(controller: str, root: Path = ROOT) -> Iterator[tuple[Path, bool]]:
    """(folder, whether it is of version 2) of each control group that may limit this process, up to the roots.

    root: of the tree of files, /proc and all.
    """
    member_of = {}
    for line in text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            member_of[not controllers] = path
    for is_second, top, place in _mounts(controller, root):
        if is_second not in member_of:
            continue
        # A container sees a part of the tree, whose top need not be above the path, which may be the host's.
        path = os.path.relpath(member_of[is_second], top)
        group = place if path.startswith("..") else place / path
        # every ancestor has its own limit
        for folder in (group, *group.parents):
            yield folder, is_second
            if folder == place:
                break


def _mounts(controller: str, root: Path) -> Iterator[tuple[bool, str, Path]]:
    """(whether of version 2, which group is at its top, where) of each tree of groups that has this controller."""
    for line in text(root / "proc/self/mountinfo").splitlines():
        mount, _, kind_and_options = line.partition(" - ")
        kind, _, options = kind_and_options.partition(" ")
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(" ")[-1].split(",")):
            top, place = (_unescaped(field) for field in mount.split(" ")[3:5])
            yield kind == "cgroup2", top, root / place.lstrip("/")


def _unescaped(field: str) -> str:
    return re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), field)
