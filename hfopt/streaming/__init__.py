"""Models that are larger than memory: layers are read from their files while others are computed."""

from hfopt.streaming.model import DiskUse, attach, detach, disk_use, settle, stream_of, turn_of
from hfopt.streaming.stream import LayerStream, Turn

__all__ = [
    "DiskUse",
    "LayerStream",
    "Turn",
    "attach",
    "detach",
    "disk_use",
    "settle",
    "stream_of",
    "turn_of",
]
