"""The forward passes of one request: the prompt, then one token a row at a time."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin

from hfopt import host
from hfopt.errors import HostError, InvalidInput

from ._types import Model, Outputs
from .decoding import Choosing, Decoding
from .inputs import position_limit
from .prefill import prefill
from .restart import Unfit, broken

# What a text decoder is given besides its tokens; anything else is left to `prepare_inputs_for_generation`.
_CONSTANT = ("use_cache", "logits_to_keep", "output_attentions", "output_hidden_states")
_ADVANCING = ("position_ids", "attention_mask")
_PLAIN = {host.REQUEST_CACHE, "inputs_embeds", *_ADVANCING, *_CONSTANT}


class Steps:
    """Calls the model with what `generate` prepared (`model_kwargs`).

    After the prompt, a text decoder with a cache needs one token, one position and one more column of the
    mask: that is built directly (`plain`). All others are prepared by their own methods, from sequences.

    choosing: steps may give the `argmax` of their logits in place of outputs. is_alone: no code of the user runs between
    them, in this thread.
    """

    def __init__(
        self,
        model: Model,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *,
        choosing: Choosing | None = None,
        is_alone: bool = False,
    ):
        self.model = model
        self.generation_config = generation_config
        self.model_kwargs = model_kwargs
        self.plain = False
        self._limit = position_limit(model, generation_config.max_length)
        self._position = 0
        self._choosing, self._is_alone = choosing, is_alone
        self._reorder: Any = getattr(model, host.REORDER, None)
        self._decoding: Decoding | None = None
        self._n_unseen = 0  # steps that `model_kwargs` know nothing of

    def prompt(self, input_ids: Tensor) -> Outputs:
        """The outputs for the prompt, int64 [n_rows, prompt length]; only its last logits are promised.

        Raises Unfit if the request's cache is not what it has to be from here on.
        """
        given = self.cache
        outputs = prefill(self.model, input_ids, self.generation_config, self.model_kwargs)
        self._update(outputs)
        self._check_cache(given)
        self.plain = self._is_plain(input_ids.device) and self._is_prepared(input_ids)
        if self.plain and self.model_kwargs.get("position_ids") is not None:
            self.model_kwargs["position_ids"] = self.model_kwargs["position_ids"][..., -1:].contiguous()
        if self._limit is not None and self.model_kwargs.get("position_ids") is not None:
            self._position = int(self.model_kwargs["position_ids"][..., -1].max())
        if self.plain:
            self._decoding = Decoding.of(
                self.model,
                self.cache,
                self.model_kwargs,
                choosing=self._choosing,
                is_alone=self._is_alone,
            )
        return outputs

    @property
    def is_ahead(self) -> bool:
        """Whether the next step was made together with the last one."""
        return self._decoding is not None and self._decoding.is_ahead

    def next(
        self,
        tokens: np.ndarray,
        sequences: Tensor | None,
        *,
        most: int = 1,
        finished: np.ndarray | None = None,
    ) -> Outputs | np.ndarray:
        """The outputs for one more token a row, int64 [n_rows]; all `sequences` are needed unless `plain`.

        Chosen tokens come as an array. most, finished: see `Decoding.step`.
        """
        if self._limit is not None and self._position >= self._limit:
            raise InvalidInput(
                f"max_length={self.generation_config.max_length}: the next token would have position "
                f"{self._position}, and the model's table of positions ends at {self._limit - 1}"
            )
        if self._limit is not None:
            most = min(most, self._limit - self._position)
        self._position += 1
        if self._decoding is not None:
            outputs = self._decoding.step(tokens, most, finished)
            if outputs is not None:
                self._n_unseen += 1
                return outputs
        if not self.plain:
            model_inputs = self.model.prepare_inputs_for_generation(
                sequences,
                next_sequence_length=1 if self.model_kwargs["use_cache"] else None,
                **self.model_kwargs,
            )
            outputs = self.model(**model_inputs, return_dict=True)
            cache = self.cache
            self._update(outputs)
            self._check_same(cache, self.cache)
            return outputs
        if self._n_unseen:
            self._advance(self._n_unseen)
            self._n_unseen = 0
        model_inputs = self._inputs(torch.tensor(tokens))  # a copy: hooks may keep it
        self._advance(1)
        outputs = self.model(return_dict=True, **model_inputs)
        self._check_same(self.cache, host.cache_in(outputs.values()) or self.cache)
        if self._decoding is not None:
            self._decoding.skip()
        return outputs

    def _inputs(self, tokens: Tensor) -> dict[str, Any]:
        """What the model is given for one more token a row, [n_rows], in a plain step."""
        given = self.model_kwargs
        inputs = {key: given[key] for key in _CONSTANT if key in given}
        inputs |= {key: given[key] for key in _ADVANCING if given.get(key) is not None}
        return inputs | {"input_ids": tokens[:, None], str(host.REQUEST_CACHE): self.cache}

    def _advance(self, n_steps: int) -> None:
        """Let `model_kwargs` be what the step after so many more is given."""
        given = self.model_kwargs
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + n_steps
        if given.get("attention_mask") is not None:
            new = given["attention_mask"].new_ones((len(given["attention_mask"]), n_steps))
            given["attention_mask"] = torch.cat([given["attention_mask"], new], dim=-1)

    @property
    def cache(self) -> Any:
        """The cache of the request, None without one."""
        return None if host.REQUEST_CACHE is None else self.model_kwargs.get(host.REQUEST_CACHE)

    def _check_cache(self, given: Any) -> None:
        """Raises Unfit unless a request that wants a cache has one: that which it was given, or made by the model."""
        cache = self.cache
        if cache is None and not self.model_kwargs["use_cache"]:
            return
        if not isinstance(cache, Cache):
            raise Unfit(f"the cache of the request is {_kind(cache)} behind the prompt")
        if given is not None and cache is not given:
            raise Unfit(f"the model has put {_kind(cache)} in the place of {_kind(given)}")
        if self.generation_config.num_beams > 1 and not self._can_reorder():
            raise Unfit(f"{_kind(cache)} cannot be reordered")

    def _check_same(self, before: Any, now: Any) -> None:
        if now is not before:
            raise HostError(
                broken(
                    f"In the middle of a request, the cache has become {_kind(now)} instead of {_kind(before)}"
                )
            )

    def _can_reorder(self) -> bool:
        return self._reorder is not None or hasattr(self.cache, "reorder_cache")

    def reorder(self, rows: Tensor) -> None:
        """Row i of the cache, if the request has one, goes on from row `rows[i]`, int32 [n_rows]."""
        if self._reorder is not None and self.cache is not None:
            self.model_kwargs[str(host.REQUEST_CACHE)] = self._reorder(self.cache, rows)
        elif self.model_kwargs["use_cache"]:
            self.cache.reorder_cache(rows)

    def _update(self, outputs: Outputs) -> None:
        update = getattr(self.model, host.UPDATE)
        self.model_kwargs = update(outputs, self.model_kwargs, is_encoder_decoder=False)

    def _is_plain(self, device: torch.device) -> bool:
        model, cache = self.model, self.cache
        return (
            all(name not in model.__dict__ for name in host.PREPARING)
            and all(getattr(type(model), name) is getattr(GenerationMixin, name) for name in host.PREPARING)
            and not model.is_remote_code()
            and model.device.type in (device.type, "meta")
            and bool(self.model_kwargs["use_cache"])
            and isinstance(cache, Cache)
            and not cache.is_compileable
            and self.model_kwargs.keys() <= _PLAIN
        )

    def _is_prepared(self, input_ids: Tensor) -> bool:
        """Whether the model's own preparation gives for the first token behind the prompt what a plain step does."""
        tokens = input_ids.new_zeros(len(input_ids), 1)
        sequences = torch.cat([input_ids, tokens], dim=1)
        theirs = self.model.prepare_inputs_for_generation(
            sequences, next_sequence_length=1, **self.model_kwargs
        )
        theirs = {name: value for name, value in theirs.items() if value is not None}
        ours = {name: value for name, value in self._inputs(tokens[:, 0]).items() if value is not None}
        if ours.get("position_ids") is not None:
            ours["position_ids"] = ours["position_ids"][..., -1:]
        return ours.keys() == theirs.keys() and all(_is_same(ours[name], theirs[name]) for name in ours)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype is other.dtype and torch.equal(one, other)
    return one is other or (type(one) is type(other) and bool(one == other))


def _kind(cache: Any) -> str:
    return "missing" if cache is None else f"a {type(cache).__name__}"
