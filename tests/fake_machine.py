"""A tree of files that tells of a process in control groups, as Linux would."""

from pathlib import Path

# Where the trees of groups are: of version 2 (also as systemd has it beside version 1), and each controller of version 1.
SECOND = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
BESIDE = "30 24 0:26 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw\n"
FIRST = (
    "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
    "31 24 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "32 24 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def write(root: Path, files: dict[str, str]) -> None:
    """Write files, named from /sys/fs/cgroup unless they begin with a stroke."""
    for name, content in files.items():
        file = root / (name[1:] if name.startswith("/") else f"sys/fs/cgroup/{name}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
