"""The forward passes of one request: the prompt, then one token a row at a time."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin

from hfopt import host
from hfopt.errors import HostError, InvalidInput

from ._types import Model, Outputs
from .decoding import Decoding
from .inputs import position_limit
from .pace import Greedy, Pace
from .prefill import Prefill, with_cache
from .restart import Unfit, broken
from .selection import argmax

# What a text decoder is given besides its tokens; anything else is left to `prepare_inputs_for_generation`.
_CONSTANT = ("use_cache", "logits_to_keep", "output_attentions", "output_hidden_states")
_ADVANCING = ("position_ids", "attention_mask")
_PLAIN = {host.REQUEST_CACHE, "inputs_embeds", *_ADVANCING, *_CONSTANT}

_NOT_AHEAD = Pace()


class Logits(NamedTuple):
    """What a loop reads of a model's outputs; logits [n_rows, 1, n_logits]."""

    logits: Tensor
    attentions: None = None
    hidden_states: None = None


class Passes:
    """The forward passes of one request: calls of the model with what `generate` prepared (`model_kwargs`), or a program's
    results where they are the same.

    After the prompt, a text decoder with a cache needs one token, one position and one more column of the mask: that is
    built directly. Where the class has a method of its own for that (`reads_sequences`), it prepares each step from all
    sequences, and a program makes those for which it prepares just that.

    pace: how far its steps may go ahead of the loop.
    """

    def __init__(
        self,
        model: Model,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        pace: Pace = _NOT_AHEAD,
    ):
        self.model = model
        self.generation_config = generation_config
        self.model_kwargs = model_kwargs
        self.reads_sequences = True
        self._limit = position_limit(model, generation_config.max_length)
        self._position = 0
        self._pace = pace
        self._reorder: Any = getattr(model, host.REORDER, None)
        self._decoding: Decoding | None = None
        self._n_unseen = 0  # steps that `model_kwargs` know nothing of

    def prompt(self, input_ids: Tensor) -> Outputs:
        """The outputs for the prompt, int64 [n_rows, prompt length]; only its last logits are promised.

        Raises Unfit if the request's cache is not what it has to be from here on.
        """
        reader = Prefill(self.model, self.cache)
        outputs = reader.read(input_ids, self.generation_config, self.model_kwargs)
        self._update(outputs)
        self._check_cache(reader.given)
        is_regular = self._is_regular(input_ids.device)
        self.reads_sequences = not is_regular or self._has_own_steps() or not self._is_prepared(input_ids)
        positions = self.model_kwargs.get("position_ids")
        if positions is not None and not self.reads_sequences:
            self.model_kwargs["position_ids"] = positions[..., -1:].contiguous()
        if self._limit is not None:
            self._position = self._next_position(input_ids)
        if is_regular:
            self._decoding = self._decoding_from_here()
        return outputs

    def _next_position(self, input_ids: Tensor) -> int:
        """The largest of those behind the prompt; 0 if the model alone knows."""
        positions = self.model_kwargs.get("position_ids")
        if positions is not None:
            return int(positions[..., -1].max())
        if host.takes_positions(type(self.model).forward):
            return 0
        return input_ids.shape[1] if self.cache is None else int(self.cache.get_seq_length())

    @property
    def is_ahead(self) -> bool:
        """Whether the next step was made together with the last one."""
        return self._decoding is not None and self._decoding.is_ahead

    def outputs(
        self,
        tokens: np.ndarray,
        sequences: Tensor | None,
        most: int = 1,
        finished: np.ndarray | None = None,
        pad: int = 0,
    ) -> Outputs:
        """The outputs for one more token a row, int64 [n_rows].

        sequences: with it, int64 [n_rows, length]; may be None unless `reads_sequences`. most: tokens that can follow. Rows
        that are finished, bool [n_rows], go on with `pad`.
        """
        inputs = self._begin(tokens, sequences)
        decoding = self._program_for(tokens, inputs)
        logits = None if decoding is None else decoding.logits(tokens, self._most(most), finished, pad)
        if logits is None:
            return self._call(tokens, inputs)
        self._note_step()
        return Logits(logits)

    def choose(
        self,
        tokens: np.ndarray,
        sequences: Tensor | None,
        greedy: Greedy,
        *,
        max_steps: int,
        finished: np.ndarray | None,
        most: int = 1,
    ) -> np.ndarray:
        """`argmax` of the logits in those outputs: int64 [n_rows].

        max_steps, finished, most: see `Decoding.choose`.
        """
        inputs = self._begin(tokens, sequences)
        decoding = self._program_for(tokens, inputs)
        if decoding is not None:
            if inputs is not None:
                max_steps = 1  # its class prepares each of them
            chosen = decoding.choose(tokens, greedy, self._most(max_steps), finished, self._most(most))
            if chosen is not None:
                self._note_step()
                return chosen
        return argmax(self._call(tokens, inputs).logits[:, -1]).numpy()

    def _most(self, n_steps: int) -> int:
        """So many steps, or as many as the model's table of positions has rows for."""
        return n_steps if self._limit is None else min(n_steps, self._limit - self._position + 1)

    def take_back(self) -> None:
        """Let the cache be as long as after the last step that was asked for."""
        if self._decoding is not None:
            self._decoding.take_back()

    def _begin(self, tokens: np.ndarray, sequences: Tensor | None) -> dict[str, Any] | None:
        """What the model's class prepares for the next step; None where it need not be asked."""
        if self._pace.speculation is not None:
            self._pace.speculation.add(tokens)
        if self._limit is not None:
            if self._position >= self._limit:
                raise InvalidInput(
                    f"max_length={self.generation_config.max_length}: the next token would have position "
                    f"{self._position}, and the model's table of positions ends at {self._limit - 1}"
                )
            self._position += 1
        return self._prepared(sequences) if self.reads_sequences else None

    def _prepared(self, sequences: Tensor | None) -> dict[str, Any]:
        n_new = 1 if self.model_kwargs["use_cache"] else None
        inputs: dict[str, Any] = self.model.prepare_inputs_for_generation(
            sequences, next_sequence_length=n_new, **self.model_kwargs
        )
        return inputs

    def _program_for(self, tokens: np.ndarray, inputs: dict[str, Any] | None) -> Decoding | None:
        """Who may make the step without the model, as far as what it would be given shows."""
        decoding = self._decoding
        if decoding is None or decoding.cache is not self.cache:
            return None
        if inputs is None or (
            self._is_plain(inputs, torch.tensor(tokens, device="cpu")) and decoding.fits(inputs)
        ):
            return decoding
        return None

    def _note_step(self) -> None:
        """Count a step of a program, for which `model_kwargs` are updated at once, or when the model is called again."""
        if self.reads_sequences:
            self._update(host.causal_output(None, self.cache))
        else:
            self._n_unseen += 1

    def _call(self, tokens: np.ndarray, inputs: dict[str, Any] | None) -> Outputs:
        """The outputs of the model itself."""
        self.take_back()
        if inputs is not None:
            return self._call_with(inputs)
        if self._n_unseen:
            self._advance(self._n_unseen)
            self._n_unseen = 0
        inputs = self._inputs(torch.tensor(tokens, device="cpu"))  # a copy: hooks may keep it
        self._advance(1)
        outputs = self.model(return_dict=True, **inputs)
        now = host.cache_in(outputs.values())
        self._check_same(self.cache, self.cache if now is None else now)
        if self._decoding is not None:
            self._decoding.skip()
        return outputs

    def _call_with(self, inputs: dict[str, Any]) -> Outputs:
        """The outputs for what the class has prepared, which may be for another cache than the last step's, or for none."""
        inputs = with_cache(self.model, inputs, self.cache)
        given = host.cache_in(inputs.values())
        outputs = self.model(**inputs, return_dict=True)
        self._update(outputs)
        if given is not None:
            self._check_same(given, self.cache)
        if self._decoding is not None:
            if self._decoding.cache is self.cache:
                self._decoding.skip()
            else:
                self._decoding = self._decoding_from_here()
        return outputs

    def _decoding_from_here(self) -> Decoding | None:
        if self.reads_sequences and not host.knows_causal_output():
            return None
        # guessed tokens would be in a cache from which its class prepares steps
        pace = self._pace._replace(speculation=None) if self.reads_sequences else self._pace
        return Decoding.of(self.model, self.cache, self.model_kwargs, pace)

    def _inputs(self, tokens: Tensor) -> dict[str, Any]:
        """What the model is given for one more token a row, [n_rows], in a plain step."""
        given = self.model_kwargs
        inputs = {key: given[key] for key in _CONSTANT if key in given}
        inputs |= {key: given[key] for key in _ADVANCING if given.get(key) is not None}
        return inputs | {"input_ids": tokens[:, None], str(host.REQUEST_CACHE): self.cache}

    def _advance(self, n_steps: int) -> None:
        """Update `model_kwargs` for so many more plain steps."""
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

    def _is_regular(self, device: torch.device) -> bool:
        """Whether a step needs no more than a plain one, and nothing but the class's own preparation may be different."""
        model, cache = self.model, self.cache
        return (
            all(name not in vars(model) for name in host.PREPARING)
            and getattr(type(model), host.UPDATE) is getattr(GenerationMixin, host.UPDATE)
            and not model.is_remote_code()
            and model.device.type in (device.type, "meta")
            and bool(self.model_kwargs["use_cache"])
            and isinstance(cache, Cache)
            and not cache.is_compileable
            and self.model_kwargs.keys() <= _PLAIN
        )

    def _has_own_steps(self) -> bool:
        theirs = GenerationMixin.prepare_inputs_for_generation
        return type(self.model).prepare_inputs_for_generation is not theirs

    def _is_prepared(self, input_ids: Tensor) -> bool:
        """Whether the model's own preparation gives for the first token behind the prompt what a plain step does."""
        tokens = input_ids.new_zeros(len(input_ids), 1)
        return self._is_plain(self._prepared(torch.cat([input_ids, tokens], dim=1)), tokens[:, 0])

    def _is_plain(self, prepared: dict[str, Any], tokens: Tensor) -> bool:
        """Whether what was prepared for one more token a row, [n_rows], is what a plain step gives the model."""
        theirs = {name: value for name, value in prepared.items() if value is not None}
        ours = {name: value for name, value in self._inputs(tokens).items() if value is not None}
        if ours.get("position_ids") is not None:
            ours["position_ids"] = ours["position_ids"][..., -1:]
        return ours.keys() == theirs.keys() and all(_is_same(ours[name], theirs[name]) for name in ours)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype is other.dtype and torch.equal(one, other)
    return one is other or (type(one) is type(other) and bool(one == other))


def _kind(cache: Any) -> str:
    return "missing" if cache is None else f"a {type(cache).__name__}"
