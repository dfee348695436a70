"""What `optimize` leaves on a model for prompts and decode steps: the program of the model as it is now."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from hfopt.errors import UnsupportedModel
from hfopt.functional import Kernels
from hfopt.functional.choice import is_known_for_torch, takes_torch
from hfopt.host import captured_outputs
from hfopt.modules.guards import is_plain_inference
from hfopt.patches.adapters import Unreadable
from hfopt.program.adapters import AdaptedProgram, Choice
from hfopt.program.decoder import build
from hfopt.program.listing import Listing
from hfopt.program.program import Program
from hfopt.program.rehearsal import difference, is_quicker
from hfopt.program.watch import Watch

logger = logging.getLogger(__name__)

_FEW = 32  # tokens that take little longer than the weights to be read


@dataclass
class _Made:
    """What was made of a model while `watch` holds. rehearsed: kinds of cache with which the program was tried.

    adapted: with the adapters of the last request. quicker: whether the program is, for a few tokens, by number of threads.
    """

    watch: Watch
    program: Program | None
    reason: str | None
    rehearsed: set[str | None] = field(default_factory=set)
    adapted: AdaptedProgram | None = None
    quicker: dict[int, bool] = field(default_factory=dict)

    def with_adapters(self) -> Program | AdaptedProgram | None:
        """The program with what adapters add now; raises Unreadable."""
        program = self.program
        if program is None or not program.adapted:
            return program
        choice, known = Choice.of(program), self.adapted
        if known is None or known.choice != choice:
            known = self.adapted = AdaptedProgram(program, choice)
        return known


class Programs:
    """Makes the program of a model when it is first asked for, and anew when the model has changed.

    Copies and pickles start empty. kv_cache: of the caches that requests of this model get. agree: see `patches.walk.Walk`.
    """

    def __init__(
        self,
        kernels: Kernels,
        kv_cache: str | None = None,
        agree: Callable[[str | None], str | None] = lambda flaw: flaw,
    ) -> None:
        self._kernels: Kernels = kernels
        self._kv_cache, self._agree = kv_cache, agree
        self._lock = threading.Lock()
        self._made: _Made | None = None

    def __reduce__(self) -> tuple[type, tuple[Kernels, str | None]]:
        return Programs, (self._kernels, self._kv_cache)

    def of(
        self, model: nn.Module, n_rows: int, n_new: int = 1, kv_cache: str | None = None
    ) -> Program | AdaptedProgram | None:
        """The program for n_new tokens in each of n_rows rows; None if they have to go module by module.

        It has given the bits of the modules, with this kind of cache.
        """
        program = self.at_all(model, kv_cache)
        plain: Program | None
        if isinstance(program, AdaptedProgram):
            # for another number of rows, peft's own layers say what is wrong
            plain = program.program if program.choice.fits(n_rows) else None
        else:
            plain = program
        if plain is None or (
            self._leaves_to_torch(plain, n_rows, n_new)
            and not (n_rows * n_new <= _FEW and self._is_quicker(model, plain, kv_cache))
        ):
            return None
        return program

    def at_all(self, model: nn.Module, kv_cache: str | None = None) -> Program | AdaptedProgram | None:
        """The program of the model for what it may be used for, whichever calls torch's kernels are quicker for; None if
        there is none."""
        if not is_plain_inference(model, (), {}) or captured_outputs() is not None:
            return None
        made = self._rehearsed(model, kv_cache)
        try:
            return made.with_adapters()
        except Unreadable:
            return None

    def _is_quicker(self, model: nn.Module, program: Program, kv_cache: str | None) -> bool:
        """Whether this program of the model is to make calls for a few tokens all the same: measured once."""
        made, n_threads = self._made, torch.get_num_threads()
        if self._kernels != "auto" or made is None or made.program is not program:
            return False
        if n_threads not in made.quicker:
            with self._lock:
                if n_threads not in made.quicker:
                    slower = None if is_quicker(model, program, kv_cache) else "the program is slower"
                    made.quicker[n_threads] = self._agree(slower) is None
        return made.quicker[n_threads]

    def _leaves_to_torch(self, program: Program, n_rows: int, n_new: int) -> bool:
        """Whether modules would compute something in torch's kernels: there may be one answer for all tokens and another
        for the last ones, of which there are logits.
        """
        by, dtype = self._kernels, program.dtype
        if by == "hfopt":
            return False
        if program.has_floats and takes_torch(by, "linear", dtype, n_rows):
            return True
        if n_new == 1:
            return False
        n_tokens = n_rows * n_new
        return takes_torch(by, "attention", dtype, n_new) or (
            program.has_floats and takes_torch(by, "linear", dtype, n_tokens)
        )

    def holds(self, program: object) -> bool:
        """Whether this is still the model's program, for the next step of a request that runs no code of its user.

        What can be different then is what another thread has changed, and it is enough to find that some steps later.
        """
        made = self._made
        if made is None or _global_forward_hooks or _global_forward_pre_hooks:
            return False
        if isinstance(program, AdaptedProgram):
            if made.program is not program.program or not program.holds_in_part():
                return False
        elif made.program is not program:
            return False
        return made.watch.holds_in_part()

    def _current(self, model: nn.Module) -> _Made:
        made = self._made
        if made is None or not made.watch.holds():
            made = self._make(model)
        return made

    def _make(self, model: nn.Module) -> _Made:
        with self._lock:
            watch = Watch(model)
            try:
                with torch.device("cpu"):  # the request may run under another default
                    made = _Made(watch, build(model), None)
            except UnsupportedModel as error:
                made = _Made(watch, None, str(error))
                logger.info("Decode steps go module by module: %s.", error)
            self._made = made
            return made

    def _rehearsed(self, model: nn.Module, kv_cache: str | None) -> _Made:
        """The current one, tried with random tokens. Only in plain inference: otherwise modules take other ways."""
        made = self._current(model)
        if made.program is not None and kv_cache not in made.rehearsed:
            with self._lock:
                program = made.program
                if program is not None and kv_cache not in made.rehearsed:
                    reason = self._agree(difference(model, program, kv_cache))
                    made.rehearsed.add(kv_cache)
                    if reason is not None:
                        made.program, made.reason = None, reason
                        logger.warning("Decode steps go module by module: %s.", reason)
        return made

    def refutation(self, model: nn.Module) -> str | None:
        """In words, why there is no program, or what it gives otherwise than the modules; None if nothing."""
        with torch.no_grad():
            is_plain = is_plain_inference(model, (), {})
        made = self._rehearsed(model, self._kv_cache) if is_plain else self._current(model)
        try:
            made.with_adapters()
        except Unreadable as error:
            return str(error)
        return made.reason

    def shown(self, model: nn.Module) -> tuple[str | None, Listing | None]:
        """(in words, why steps of this model go module by module, or None; the program for people to read)."""
        with torch.no_grad():
            is_plain = is_plain_inference(model, (), {})
        made = self._rehearsed(model, self._kv_cache) if is_plain else self._current(model)
        reason, program = made.reason, made.program
        if reason is None:
            try:
                made.with_adapters()
            except Unreadable as error:
                reason = str(error)
        if program is not None and program.has_floats:
            if self._kernels == "torch":
                reason = "its Linears run in torch's kernels"
            elif self._kernels == "auto" and is_known_for_torch("linear", program.dtype, 1):
                reason = "torch's kernels were measured to be faster for Linears of one row"
        if reason is None and not is_plain:
            reason = "autocast, a trace or hooks on all modules are on"
        return reason, None if made.program is None else made.program.listing
