"""transformers' `generate` with loops, a gate and a cache of ours."""

from .decoding import PROGRAMS, obstacle
from .generate import generate, generator_of, install, prepare_cache, uninstall
from .latency import Latency, record_latency
from .prompt import share_prompts, unshare_prompts

__all__ = [
    "PROGRAMS",
    "Latency",
    "generate",
    "generator_of",
    "install",
    "obstacle",
    "prepare_cache",
    "record_latency",
    "share_prompts",
    "uninstall",
    "unshare_prompts",
]
