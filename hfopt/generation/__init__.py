"""transformers' `generate` with loops, a gate and a cache of ours."""

from .decoding import PROGRAMS, obstacle
from .generate import (
    cache_obstacle,
    generate,
    generator_of,
    install,
    is_installed,
    kv_cache_of,
    prepare_cache,
    uninstall,
)
from .latency import Latency, record_latency
from .prompt import share_prompts, unshare_prompts
from .proof import MODES, in_words, prove, refusals
from .verdict import Verdict, keep_verdict, verdict_of

__all__ = [
    "MODES",
    "PROGRAMS",
    "Latency",
    "Verdict",
    "cache_obstacle",
    "generate",
    "generator_of",
    "in_words",
    "install",
    "is_installed",
    "keep_verdict",
    "kv_cache_of",
    "obstacle",
    "prepare_cache",
    "prove",
    "record_latency",
    "refusals",
    "share_prompts",
    "uninstall",
    "unshare_prompts",
    "verdict_of",
]
