"""Processes that have one model together: their memory, and what they do with it."""

from hfopt.distributed.cluster import ClusterGroup
from hfopt.distributed.group import SharedGroup

__all__ = ["ClusterGroup", "SharedGroup"]
