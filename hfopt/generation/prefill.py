"""The prompt by a program, in place of a call of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin

from hfopt import host
from hfopt.cache import IndirectCache

from ._types import Model, Outputs
from .conditions import LOOKS_INSIDE, are_near, has_flags, has_gaps, has_hooks, positions_of, wanted
from .context import LEAST_TOGETHER, can_share, read_shared
from .prefixes import Prompts, is_private
from .prompt import one_row_per_prompt, repeat_rows, share_prompts, unshare_prompts
from .protocols import StepProgram
from .state import installed

if TYPE_CHECKING:
    from hfopt.functional import Mask

_READ = {"input_ids", "position_ids", "attention_mask"}
_LAST = {"logits_to_keep": 1}  # which is not said to a model that takes no such argument
_FIXED = {**_LAST, "use_cache": True, "return_dict": True}
# all that a text without a past needs
_TEXT = {*_READ, *_FIXED, *LOOKS_INSIDE, "inputs_embeds"}
# Multiply-adds in one call, which Ctrl-C does not interrupt: half a second to one on two cores. A longer prompt takes the
# modules no longer.
_MAX_WORK = 1 << 37


class Prefill:
    """The prompt of a request: by the model's program where that gives what its modules would, by the model elsewhere.

    cache: of the request. given: the cache that the model was called with, None for a call without one.
    """

    def __init__(self, model: Model, cache: Any) -> None:
        self._model, self._cache = model, cache
        self._copies = 1  # of each prompt, of which one may be read
        self._reads_beginnings = self._moves = False
        self._mask: Tensor | None = None
        self.given = cache

    def read(
        self, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> Outputs:
        """The outputs for these tokens, of which only the logits of the last one are promised."""
        model = self._model
        is_first = not generation_config.is_assistant
        if generation_config.prefill_chunk_size is None:
            self._copies = max(generation_config.num_beams, generation_config.num_return_sequences)
            self._reads_beginnings = is_first
            self._moves = not generation_config.return_dict_in_generate
        arguments = input_ids, generation_config, model_kwargs
        theirs = getattr(GenerationMixin, host.PREFILL)
        if host.PREFILL in vars(model) or getattr(type(model), host.PREFILL) is not theirs:
            return getattr(model, host.PREFILL)(*arguments, is_first_iteration=is_first)
        stand_in: Any = self
        outputs = theirs(stand_in, *arguments, is_first_iteration=is_first)
        if self._mask is not None:
            model_kwargs["attention_mask"] = self._mask
        return outputs

    # `GenerationMixin._prefill` prepares the prompt, in chunks if that is asked for, and calls the model: `self(...)`. With
    # this object as its `self`, those calls come here, and whatever else it reads of `self` is the model's.

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Outputs:
        inputs = with_cache(self._model, inputs, self._cache)
        self.given = host.cache_in(inputs.values())
        ring = installed(self._model).ring
        if ring is None:
            return self._read(inputs)
        if ring.refusal is None and self._is_shared(inputs):
            with ring.reading():
                return read_shared(self._model, ring, inputs, self.given)
        try:
            return self._read(inputs)
        finally:
            ring.meet()

    def _read(self, inputs: dict[str, Any]) -> Outputs:
        prompts = Prompts.of(self._model, inputs, moves=self._moves) if self._reads_beginnings else None
        if prompts is None:
            return self._outputs(inputs)
        try:
            outputs = self._outputs(prompts.begin(self._outputs))
        except BaseException:
            self.given.reset()
            raise
        prompts.keep()
        self._mask = prompts.mask
        return outputs

    def _outputs(self, inputs: dict[str, Any]) -> Outputs:
        outputs = self._run(inputs) if self._is_plain(inputs) else self._run_shared(inputs)
        return self._model(**inputs) if outputs is None else outputs

    def _run_shared(self, inputs: dict[str, Any]) -> Outputs | None:
        """The outputs of the model for one row of each prompt, repeated as its cache is; None where that cannot be.

        Only for a cache of transformers, and an empty one: one of ours shares prompts by itself.
        """
        model, cache = self._model, self.given
        if self._copies == 1 or type(cache) is not DynamicCache or host.cached_length(cache) != 0:
            return None
        is_text = model.config.get_text_config() is model.config
        if (
            not is_text
            or getattr(model, host.REORDER, None) is not None
            or not hasattr(cache, "reorder_cache")
        ):
            return None
        has_own_rows = model.training or host.have_own_adapters(model)
        thinned = None if has_own_rows else one_row_per_prompt(inputs, self._copies)
        if thinned is None:
            return None
        outputs = model(**thinned)
        n_prompts = len(outputs.logits)
        rows: Any = torch.arange(n_prompts, device="cpu").repeat_interleave(self._copies)
        cache.reorder_cache(rows)
        return repeat_rows(outputs, n_prompts, self._copies)

    def _is_shared(self, inputs: dict[str, Any]) -> bool:
        """Whether processes read these tokens together: a long prompt without padding, over a cache of its own."""
        is_whole = self._reads_beginnings and self._moves and is_private()
        if not is_whole or not self._is_plain(inputs):
            return False
        text = _Text.of(self._model, inputs, 0)
        if text is None or text.tokens.shape[1] < LEAST_TOGETHER or not text.is_unpadded:
            return False
        return can_share(self._model, self.given, text.tokens.shape[1])

    def _is_plain(self, inputs: dict[str, Any]) -> bool:
        """Whether a call asks for no more than the logits of the last token of a text, from a model that just reads it."""
        model = self._model
        given = host.cache_given(inputs)
        if installed(model).programs is None or given is None or not isinstance(given[1], IndirectCache):
            return False
        if given[0] != host.cache_argument(type(model).forward) or not host.knows_causal_output():
            return False
        asked = {**_LAST, **inputs}
        if any(asked.get(name) is not value for name, value in _FIXED.items()):
            return False
        others = inputs.keys() - _FIXED.keys() - _READ - {given[0]}
        if not all(inputs[name] is None or (name in LOOKS_INSIDE and not inputs[name]) for name in others):
            return False
        return not wanted(model) and not has_hooks(model)

    def _run(self, inputs: dict[str, Any]) -> Outputs | None:
        """The outputs of a program; None if modules have to do it, with nothing changed but what they change first."""
        model, cache = self._model, host.cache_in(inputs.values())
        assert isinstance(cache, IndirectCache)
        shared = share_prompts(model, (), inputs)
        given = inputs if shared is None else shared[1]
        text = _Text.of(model, given, cache.get_seq_length())
        if text is None:
            return None
        programs, (n_rows, n_new) = installed(model).programs, text.tokens.shape
        program = None if programs is None else programs.of(model, n_rows, n_new, cache.kv_cache)
        if program is None or len(cache.layers) != len(program.layouts):
            return None
        logits = text.read(program, cache)
        if logits is None:
            return None
        outputs = host.causal_output(logits, cache)
        return unshare_prompts(model, (), given, outputs) or outputs


class _Text(NamedTuple):
    """New tokens [n_rows, n_new] behind n_past others, their positions [1 or n_rows, n_new] if the model is given them, and
    a mask.
    """

    tokens: Tensor
    positions: Tensor | None
    mask: Tensor | None  # [n_rows, n_past + n_new]
    n_past: int

    @classmethod
    def of(cls, model: Model, inputs: dict[str, Any], n_past: int) -> _Text | None:
        """Read the arguments of a call; None if they have another form."""
        tokens, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if not _is_matrix(tokens) or not (mask is None or _is_matrix(mask)):
            return None
        n_rows, n_new = tokens.shape
        positions = positions_of(model, inputs.get("position_ids"), n_past, n_new)
        if positions is not None and (
            not _is_matrix(positions)
            or positions.shape not in ((1, n_new), (n_rows, n_new))
            or not are_near(positions, n_past + n_new)
        ):
            return None
        if mask is not None and mask.shape != (n_rows, n_past + n_new):
            return None
        if mask is not None and not bool((mask != 0).any(dim=1).all()):
            return None  # what a token sees that sees nothing depends on the kind of attention
        return cls(tokens, positions, mask, n_past)

    @property
    def is_unpadded(self) -> bool:
        """Whether each token has its column as its position, and sees all those before it."""
        n_new = self.tokens.shape[1]
        columns = torch.arange(self.n_past, self.n_past + n_new, device="cpu")
        in_order = self.positions is None or bool((self.positions == columns).all())
        return in_order and (self.mask is None or bool((self.mask != 0).all()))

    def read(self, program: StepProgram, cache: IndirectCache) -> Tensor | None:
        """Logits [n_rows, 1, n_logits]; None, with nothing changed, for a long text, one that the program does not take, and
        if layers hold different tokens.
        """
        n_rows, n_new = self.tokens.shape
        n_keys = self.n_past + n_new
        mask = None if self.mask is None else (self.mask != 0).numpy()
        most_keys = program.most_keys(
            has_positions=self.positions is not None, has_gaps=has_gaps(mask), has_flags=has_flags(self.mask)
        )
        if program.work(n_rows, n_new, n_keys) > _MAX_WORK or n_keys > most_keys:
            return None
        appended = cache.append_everywhere(n_rows, n_new, program.layouts)
        if appended is None:
            return None
        # a program that is not given positions reads none
        given = (
            torch.zeros(1, n_new, dtype=torch.long, device="cpu")
            if self.positions is None
            else self.positions
        )
        tokens, positions = (each.numpy().astype(np.int64, copy=False) for each in (self.tokens, given))
        try:
            return program.prefill(tokens, positions, appended, self._causal_mask())
        except BaseException:  # its columns have not been written
            if self.n_past:
                cache.crop(-n_new)
            else:
                cache.reset()
            raise

    def _causal_mask(self) -> Mask:
        """The mask that transformers makes of `mask` for each new token, in the form that `prepare_mask` gives it."""
        from hfopt.functional import Mask  # not at the top, because `import hfopt` must not load Numba

        if self.mask is None or bool((self.mask != 0).all()):
            return Mask("causal")
        n_new, n_keys = self.tokens.shape[1], self.mask.shape[1]
        causal = torch.ones(n_new, n_keys, dtype=torch.bool, device="cpu").tril_(self.n_past)
        each = (self.mask != 0)[:, None] & causal
        return Mask("bytes", each.contiguous().view(torch.uint8).numpy())


def _is_matrix(value: Any) -> TypeGuard[Tensor]:
    return type(value) is Tensor and value.is_cpu and value.dim() == 2 and value.numel() > 0


def with_cache(model: Model, inputs: dict[str, Any], cache: Any) -> dict[str, Any]:
    """The arguments of a call, with an empty cache of ours if the model's class has left out that of the request, `cache`.

    Without one, a model that is told to use a cache begins a new one. Phi-3 does so where a text outgrows the first of its
    two rotations: all keys are computed anew.
    """
    given = {name for name, value in inputs.items() if value is not None}
    # beside other arguments it may be there in another form
    is_left_out = bool(inputs.get("use_cache")) and given <= _TEXT
    if not is_left_out or not isinstance(cache, IndirectCache):
        return inputs
    return {**inputs, str(host.REQUEST_CACHE): cache.emptied(model.config.get_text_config(decoder=True))}
