"""Processes that work on one model together: their memory, and what they do with it."""

from hfopt.distributed.group import SharedGroup

__all__ = ["SharedGroup"]
