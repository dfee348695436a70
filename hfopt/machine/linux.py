"""Files in which Linux describes this process and its machine. Other systems have none of them."""

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def text(file: Path) -> str:
    """Content of a file, "" if it cannot be read."""
    try:
        return file.read_text()
    except OSError:
        return ""


def control_groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """(folder, whether it is of version 2) of each control group that may limit this process, up to the roots."""
    for line in text(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        is_second = not controllers
        if not is_second and controller not in controllers.split(","):
            continue
        root = CGROUP if is_second else CGROUP / controller
        # Every ancestor has its own limit. In a container the path may be the host's: only the root exists.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            yield folder, is_second
            if folder == root:
                break
