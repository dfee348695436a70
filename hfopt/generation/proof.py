"""The proof of our loops: once on a machine, a tiny model generates in transformers' loops and in ours.

What gives other results, or raises, is left to transformers. The outcome is kept beside the compiled kernels, by what it
depends on: the sources of hfopt, torch, and the code of transformers that the loops stand on.
"""

import contextlib
import functools
import hashlib
import logging
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.utils import ModelOutput

from hfopt import host
from hfopt.errors import ForkedProcess, KernelError
from hfopt.machine import private_file

from ._types import Model
from .proof_cases import CASES, COMMON, OTHER_LOOPS, Case, tiny_model

__all__ = ["MODES", "OTHER_LOOPS", "in_words", "prove", "refusals"]

logger = logging.getLogger(__name__)

# what is proven, and what is done only over a cache of ours
MODES = tuple(dict.fromkeys(case.mode for case in CASES))

_ENTRIES = "refusals"
_RELATIVE, _ABSOLUTE = 1e-5, 1e-5  # of scores: the same operations, in another order
_lock = threading.RLock()
_known: tuple[tuple[Any, ...], dict[str, str]] | None = None  # the methods that it is about, and the refusals


def refusals() -> Mapping[str, str]:
    """Modes that are left to transformers' loops and caches in this process, and why.

    Raises KernelError and ForkedProcess, which say nothing about transformers.
    """
    known = _known
    if known is None or known[0] != host.methods():
        with _lock:
            known = _known
            if known is None or known[0] != host.methods():
                known = _find()
    return known[1]


def prove() -> dict[str, str]:
    """The refusals, found out anew and kept."""
    with _lock:
        return dict(_find(is_new=True)[1])


def _find(is_new: bool = False) -> tuple[tuple[Any, ...], dict[str, str]]:
    global _known
    methods, identity = host.methods(), _identity()
    file = private_file.path("loops", identity)
    entries = None if is_new else private_file.read(file, identity, _ENTRIES)
    if entries is None:
        entries = _run()
        private_file.write(file, identity, _ENTRIES, entries)
    _known = methods, {str(mode): str(reason) for mode, reason in entries.items()}
    if text := in_words(_known[1]):
        logger.warning("%s", text)
    return _known


def in_words(refused: Mapping[str, str]) -> str | None:
    """One sentence about the modes that are left to transformers, and why; None if there are none."""
    if not refused:
        return None
    by_reason: dict[str, list[str]] = {}
    for mode, reason in refused.items():
        by_reason.setdefault(reason, []).append(mode)
    parts = [f"{', '.join(modes)} ({reason})" for reason, modes in by_reason.items()]
    return f"transformers {host.installed()} runs these in loops of its own: {'; '.join(parts)}."


@functools.lru_cache(maxsize=1)
def _sources() -> str:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for source in sorted(package.rglob("*.py")):
        digest.update(str(source.relative_to(package)).encode() + source.read_bytes())
    return digest.hexdigest()[:20]


def _identity() -> dict[str, Any]:
    return {"sources": _sources(), "torch": torch.__version__, "transformers": host.fingerprint()}


def _run() -> dict[str, str]:
    """The first case of each mode in which the two differ, in words."""
    modes = {case.mode: None for case in CASES if case.mode != OTHER_LOOPS}
    lack = host.missing()
    found = {mode: lack or "it has no such mode" for mode in modes if lack or mode not in host.MODES.values()}
    cases = [case for case in CASES if case.mode not in found]
    with _undisturbed():
        try:
            models = {has_ties: tiny_model(has_ties) for has_ties in (False, True)}
        except Exception as error:  # noqa: BLE001  (whatever a foreign release raises)
            return {
                case.mode: f"the model for its proof cannot be made ({_in_words(error)})" for case in CASES
            }
        for case in cases:
            if case.mode not in found and (what := _compare(case, models[case.has_ties])) is not None:
                found[case.mode] = f"{case.name}: {what}"
    return found


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Within, one thread (models this small only wait for each other's) and random numbers apart from the caller's."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_num_threads(n_threads)


def _compare(case: Case, model: Model) -> str | None:
    from .generate import install, uninstall  # which asks this module for the outcome

    stock = _outcome(case, functools.partial(type(model).generate, model))
    try:
        install(model)
        return difference(stock, _outcome(case, functools.partial(_ours, model, case)))
    finally:
        uninstall(model)


def _ours(model: Model, case: Case, **arguments: Any) -> Any:
    from .generate import run_in
    from .plan import our_cache, our_loop

    if case.mode == OTHER_LOOPS:
        with our_cache(True):
            return type(model).generate(model, **arguments)
    mode = next(mode for mode, words in host.MODES.items() if words == case.mode)
    loop = our_loop(model, mode)
    if loop is None:
        raise LookupError("its loop is not known")
    return run_in(loop, model, arguments)


def _outcome(case: Case, call: Any) -> Any:
    """The result of a request, and the next random number; or the error that it raises."""
    torch.manual_seed(11)
    try:
        result = case.request(call, {**COMMON, **case.options})
    except (KernelError, ForkedProcess):
        raise
    except Exception as error:  # noqa: BLE001  (what it raises is the outcome)
        return error
    return result, {"the next random number": torch.rand(1)}


def difference(stock: Any, ours: Any, what: str = "the result") -> str | None:
    """In words, where two results of `generate` differ; None if they are equal, scores within rounding."""
    if isinstance(stock, Exception):
        return f"transformers' own {_in_words(stock)}"
    if isinstance(ours, Exception):
        return f"hfopt's {_in_words(ours)}"
    if isinstance(stock, Cache) and isinstance(ours, Cache):
        lengths = host.cached_length(stock), host.cached_length(ours)
        return None if lengths[0] == lengths[1] else f"{what} holds {lengths[1]} tokens, not {lengths[0]}"
    if type(stock) is not type(ours):
        return f"{what} is a {type(ours).__name__}, not a {type(stock).__name__}"
    if isinstance(stock, Tensor):
        return _tensors_differ(stock, ours, what)
    if isinstance(stock, (dict, ModelOutput)):
        if list(stock.keys()) != list(ours.keys()):
            return f"{what} has the fields {', '.join(ours.keys())}, not {', '.join(stock.keys())}"
        parts = [(stock[name], ours[name], str(name)) for name in list(stock.keys())]
    elif isinstance(stock, (tuple, list)):
        if len(stock) != len(ours):
            return f"{what} has {len(ours)} parts, not {len(stock)}"
        parts = [(*pair, what) for pair in zip(stock, ours, strict=True)]
    else:
        return None if stock == ours else f"{what} is {ours!r}, not {stock!r}"
    return next((found for part in parts if (found := difference(*part)) is not None), None)


def _tensors_differ(stock: Tensor, ours: Tensor, what: str) -> str | None:
    if stock.shape != ours.shape or stock.dtype is not ours.dtype:
        return f"{what}: {ours.dtype} {tuple(ours.shape)}, not {stock.dtype} {tuple(stock.shape)}"
    if stock.is_floating_point():
        is_equal = torch.allclose(stock, ours, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True)
    else:
        is_equal = torch.equal(stock, ours)
    return None if is_equal else f"{what}: other values"


def _in_words(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"raises {type(error).__name__}: {text[0][:160]}" if text else f"raises {type(error).__name__}"
