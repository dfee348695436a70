"""The one gate for bad input: what the model will see of a prompt is looked at before anything runs.

Which tokens are new, and where they stand, `generate` tells from the shapes of prompt, mask and cache. The gate counts as it
does, so that whatever transformers has a result for passes, and says what is wrong with the rest.
"""

import inspect
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hfopt import host
from hfopt.errors import InvalidInput

from ._types import Model

_INDICES = (torch.int64, torch.int32)  # the types that an embedding takes


class _Prompt(NamedTuple):
    """What `generate` reads a prompt from.

    name, tokens: the argument that the model reads, ids [n_rows, length] or embeddings [n_rows, length, width]. text: what
    masks are made of where none is given, the ids if there are some. n_past: tokens in the cache.
    """

    name: str
    tokens: Tensor
    text: Tensor
    mask: Tensor | None
    positions: Tensor | None
    n_past: int

    @classmethod
    def of(cls, arguments: Mapping[str, Any], table: Tensor | None) -> "_Prompt | None":
        """Find the prompt in `arguments`; None if `generate` starts from its own begin token, and if nobody knows where.

        table: of the token embedding.
        """
        inputs, embeds = arguments.get("inputs"), arguments.get("inputs_embeds")
        ids: Any = inputs if inputs is not None else arguments.get("input_ids")
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        if ids is None and embeds is None:
            return None
        if ids is not None:
            _check_ids(ids)
        if embeds is not None:
            _check_embeds(embeds, table)
        if mask is not None:
            _check_mask(mask)
        if positions is not None and not isinstance(positions, Tensor):
            raise InvalidInput(f"position_ids: must be a tensor of integers, not {_kind(positions)}")
        n_past = host.cached_length(host.cache_in(arguments.values()))
        if n_past is None:
            return None
        name, tokens = ("input_ids", ids) if embeds is None else ("inputs_embeds", embeds)
        text = ids if ids is not None and ids.shape[1] else tokens
        return cls(name, tokens, text, mask, positions, n_past)

    @property
    def new(self) -> Tensor:
        """The tokens that the model will be given, as `generate` slices them.

        Embeddings are of all tokens. Ids are too if the mask is as long, and otherwise only of the new ones.
        """
        length = self.tokens.shape[1]
        spans = self.text if self.mask is None else self.mask
        holds_all = self.name == "inputs_embeds" or spans.shape[1] == length
        return self.tokens[:, self.n_past - length :] if holds_all else self.tokens


def check_inputs(model: Model, arguments: Mapping[str, Any]) -> None:
    """Raises InvalidInput for a prompt that `model` cannot read.

    arguments: of `generate`, by name. Models of anything but plain text are left to their own checks: their prompts may
    hold ids that stand for images or sound.
    """
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        return
    if model.config.get_text_config() is not model.config:
        return
    table = getattr(model.get_input_embeddings(), "weight", None)
    prompt = _Prompt.of(arguments, table)
    if prompt is None:
        return
    _check_new(prompt, None if table is None else host.vocabulary(model))
    if _option("prefill_chunk_size", model, arguments) is None:  # each chunk is given positions of its own
        _check_shapes(model, prompt)
        _check_positions(model, prompt, arguments)


def check_counts(num_beams: Any, num_return_sequences: Any) -> None:
    """Raises InvalidInput for numbers of beams, and of results, that no request can have."""
    if not _is_whole(num_beams) or num_beams < 1:
        raise InvalidInput(f"num_beams={num_beams!r}: must be an integer of at least 1")
    if not _is_whole(num_return_sequences) or (num_beams > 1 and num_return_sequences == 0):
        raise InvalidInput(f"num_return_sequences={num_return_sequences!r}: must be an integer of at least 1")


def position_limit(model: Model, length: int) -> int | None:
    """The first position that the model's table has no row for; None where `length` cannot pass it.

    A table is an embedding, other than that of the tokens, with a row for each of `max_position_embeddings`
    (and a few for an offset), or a buffer with exactly that many rows. Computed positions have no end.
    """
    n_positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(n_positions, int) or length <= n_positions:
        return None
    tokens = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and id(module) not in tokens:
            if module.num_embeddings - n_positions in range(9):
                offset: int = getattr(module, "offset", 0)
                return module.num_embeddings - offset
        elif any(each.dim() == 2 and len(each) == n_positions for each in module.buffers(recurse=False)):
            return n_positions
    return None


def _check_ids(ids: Any) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in _INDICES:
        raise InvalidInput(f"input_ids: must be a tensor of integers, int64 or int32, not {_kind(ids)}")
    if ids.dim() != 2:
        raise InvalidInput(f"input_ids of shape {tuple(ids.shape)}: must be [batch, length]")


def _check_embeds(embeds: Any, table: Tensor | None) -> None:
    if not isinstance(embeds, Tensor):
        raise InvalidInput(f"inputs_embeds: must be a floating point tensor, not {_kind(embeds)}")
    shape = tuple(embeds.shape)
    if len(shape) != 3 or (table is not None and shape[2] != table.shape[1]):
        width = "hidden_size" if table is None else table.shape[1]
        raise InvalidInput(f"inputs_embeds of shape {shape}: must be [batch, length, {width}]")


def _check_mask(mask: Any) -> None:
    if not isinstance(mask, Tensor):
        raise InvalidInput(f"attention_mask: must be a tensor of 0 and 1, not {_kind(mask)}")
    # `generate` drops a mask of nothing but 1, whatever its shape is
    if mask.dim() < 2 or (mask.dim() > 2 and not bool((mask == 1).all())):
        raise InvalidInput(f"attention_mask of shape {tuple(mask.shape)}: must be [batch, length]")


def _check_new(prompt: _Prompt, n_known: int | None) -> None:
    """Check that there are new tokens, and in the embedding; it does not look up the others."""
    tokens, new = prompt.tokens, prompt.new
    given = f"{prompt.name} of shape {tuple(tokens.shape)}"
    if not tokens.numel():
        raise InvalidInput(f"{given}: the prompt is empty, at least one token is needed")
    if not new.numel():
        raise InvalidInput(
            f"{given}: taken for all tokens, and the cache holds {prompt.n_past}; new ones alone need an "
            "attention_mask over all"
        )
    if prompt.name != "input_ids" or n_known is None:
        return
    smallest, largest = new.aminmax()
    if smallest < 0 or largest >= n_known:
        row, column = ((new < 0) | (new >= n_known)).nonzero()[0].tolist()
        column += tokens.shape[1] - new.shape[1]
        raise InvalidInput(
            f"input_ids[{row}, {column}]={int(tokens[row, column])}: must be from 0 to {n_known - 1}, "
            "the rows of the model's token embedding"
        )


def _check_shapes(model: Model, prompt: _Prompt) -> None:
    """Check that positions, or what they are made of, are enough for the new tokens, which are the last; or one for all."""
    mask, positions = prompt.mask, prompt.positions
    n_rows, n_new = prompt.new.shape[:2]
    if positions is not None:
        name, given = "position_ids", positions
    else:
        name, given = ("input_ids", prompt.text) if mask is None else ("attention_mask", mask)
    if given.dim() < 2 or (positions is not None and given.dim() > 2):
        return  # positions for all rows, or several of each token, are for the model to read
    rows, columns = given.shape[:2]
    if (rows not in (1, n_rows) or min(columns, n_new) not in (1, n_new)) and _takes_positions(model):
        raise InvalidInput(f"{name} of shape {tuple(given.shape)}: must be [{n_rows}, {n_new} or more]")


def _check_positions(model: Model, prompt: _Prompt, arguments: Mapping[str, Any]) -> None:
    positions = prompt.positions
    is_given = positions is not None
    if positions is None:
        mask = prompt.mask
        if mask is None and position_limit(model, prompt.text.shape[1]) is None:
            return
        mask = _mask_of_pads(model, prompt.text, arguments) if mask is None else mask
        positions = (mask.long().cumsum(-1) - 1).where(mask != 0, 0)
    new = positions[..., -prompt.new.shape[1] :]
    if not new.numel() or new.dtype not in _INDICES:
        return  # what is no index, a table does not take
    largest = int(new.max())
    limit = position_limit(model, largest + 1)
    if limit is None or largest < limit or not _takes_positions(model):
        return
    if is_given:
        raise InvalidInput(f"position_ids: {largest} is past the last position of the model, {limit - 1}")
    raise InvalidInput(
        f"input_ids: the prompt has a token at position {largest}, and the last position of the model is {limit - 1}"
    )


def _mask_of_pads(model: Model, text: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """The mask [n_rows, length] that `generate` makes where none is given, or one that hides more."""
    pad = _option("pad_token_id", model, arguments)
    return text.new_ones(text.shape[:2]) if pad is None or text.dim() > 2 else text != pad


def _option(name: str, model: Model, arguments: Mapping[str, Any]) -> Any:
    """What a request has for a field of GenerationConfig."""
    value = arguments.get(name)
    for config in (arguments.get("generation_config"), model.generation_config):
        value = getattr(config, name, None) if value is None else value
    return value


def _takes_positions(model: Model) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _is_whole(value: Any) -> bool:
    """Whether a number of Python, numpy or torch counts something; 1 may be of any kind, for nothing is repeated then."""
    try:
        return bool(value == 1) or bool(operator.index(value) == value)
    except (TypeError, ValueError, RuntimeError):
        return False


def _kind(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
