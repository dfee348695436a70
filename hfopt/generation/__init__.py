"""transformers' `generate` with loops, a gate and a cache of ours."""

from hfopt.host import generator_of

from .conditions import obstacle
from .context import LEAST_TOGETHER, can_share, read_shared
from .generate import (
    cache_obstacle,
    check_prefix_cache,
    generate,
    install,
    is_installed,
    prefix_obstacle,
    prepare_cache,
    uninstall,
    window_of,
)
from .grammar import Grammar
from .latency import Latency, record_latency
from .loops import hf_beam_sample, hf_beam_search, hf_greedy_search, hf_sample
from .plan import lookup_of
from .prompt import share_prompts, unshare_prompts
from .proof import MODES, in_words, prove, refusals
from .protocols import StepProgram, StepPrograms, StepRun
from .state import NOTHING, Installed, Verdict, installed, keep

__all__ = [
    "LEAST_TOGETHER",
    "MODES",
    "NOTHING",
    "Grammar",
    "Installed",
    "Latency",
    "StepProgram",
    "StepPrograms",
    "StepRun",
    "Verdict",
    "cache_obstacle",
    "can_share",
    "check_prefix_cache",
    "generate",
    "generator_of",
    "hf_beam_sample",
    "hf_beam_search",
    "hf_greedy_search",
    "hf_sample",
    "in_words",
    "install",
    "installed",
    "is_installed",
    "keep",
    "lookup_of",
    "obstacle",
    "prefix_obstacle",
    "prepare_cache",
    "prove",
    "read_shared",
    "record_latency",
    "refusals",
    "share_prompts",
    "uninstall",
    "unshare_prompts",
    "window_of",
]
