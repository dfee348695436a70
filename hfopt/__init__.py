"""Faster generation on CPUs for the models of transformers: `hfopt.optimize(model)`."""

import importlib
from types import ModuleType

import hfopt.host  # noqa: F401  (first: it says so if the installed transformers is too old)  # isort: split
from hfopt.cache import IndirectCache, PrefixCache
from hfopt.chat import Chat
from hfopt.checkpoints.hf_config import HfoptConfig
from hfopt.embedded import embedded_model
from hfopt.errors import (
    CacheFull,
    CorruptCheckpoint,
    ForkedProcess,
    HfoptError,
    HostError,
    InvalidInput,
    KernelError,
    RankError,
    UnsupportedDevice,
    UnsupportedModel,
)
from hfopt.generation import Grammar, record_latency
from hfopt.load import load
from hfopt.optimize import optimize, restore
from hfopt.report import Report, explain
from hfopt.save import save
from hfopt.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "CacheFull",
    "Chat",
    "CorruptCheckpoint",
    "ForkedProcess",
    "Grammar",
    "HfoptConfig",
    "HfoptError",
    "HostError",
    "IndirectCache",
    "InvalidInput",
    "KernelError",
    "PrefixCache",
    "RankError",
    "Report",
    "UnsupportedDevice",
    "UnsupportedModel",
    "__version__",
    "embedded_model",
    "explain",
    "load",
    "optimize",
    "record_latency",
    "restore",
    "save",
    "warmup",
]


def __getattr__(name: str) -> ModuleType:
    # they load Numba, which an import of hfopt alone is not to wait for
    if name in ("functional", "modules"):
        return importlib.import_module(f"hfopt.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
