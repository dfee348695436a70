"""transformers' `generate` with loops, a gate and a cache of ours."""

from .generate import generate, install, prepare_cache, uninstall
from .latency import Latency, record_latency
from .prompt import share_prompts, unshare_prompts

__all__ = [
    "Latency",
    "generate",
    "install",
    "prepare_cache",
    "record_latency",
    "share_prompts",
    "uninstall",
    "unshare_prompts",
]
