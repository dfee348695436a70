"""Processes that have one model together: their memory, and what they do with it."""

from hfopt.distributed.cluster import ClusterGroup
from hfopt.distributed.group import SharedGroup
from hfopt.distributed.ranks import Ranks
from hfopt.distributed.ring import Ring

__all__ = ["ClusterGroup", "Ranks", "Ring", "SharedGroup"]
