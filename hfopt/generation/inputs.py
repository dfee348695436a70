"""The one gate for bad input: what will reach an embedding, a mask or a table is looked at here."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import host
from ..errors import InvalidInput
from ._types import Model


def check_inputs(model: Model, model_kwargs: Mapping[str, Any]) -> None:
    """Raises InvalidInput for a prompt that `model` cannot read.

    `model_kwargs` as given to `generate`, by name. Models of anything but plain text are left to
    their own checks: their prompts may hold ids that stand for images or sound.
    """
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        return
    if model.config.get_text_config() is not model.config:
        return
    inputs = model_kwargs.get("inputs")
    input_ids = inputs if inputs is not None else model_kwargs.get("input_ids")
    inputs_embeds = model_kwargs.get("inputs_embeds")
    table = getattr(model.get_input_embeddings(), "weight", None)
    prompt = inputs_embeds if inputs_embeds is not None else input_ids
    if prompt is None:
        return  # generate starts from its own begin token
    if inputs_embeds is not None:
        _check_embeds(inputs_embeds, table)
    else:
        _check_ids(input_ids, table)
    cache = host.cache_in(model_kwargs.values())
    n_past = 0 if cache is None else int(cache.get_seq_length())
    attention_mask, position_ids = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if attention_mask is not None:
        _check_mask(attention_mask, prompt.shape[:2], n_past)
    if position_ids is not None:
        _check_integer("position_ids", position_ids)
    _check_positions(model, prompt.shape[1] + n_past, attention_mask, position_ids)


def check_counts(num_beams: Any, num_return_sequences: Any) -> None:
    """Raises InvalidInput unless both are positive integers."""
    for name, value in (("num_beams", num_beams), ("num_return_sequences", num_return_sequences)):
        if not isinstance(value, int) or value < 1:
            raise InvalidInput(f"{name}={value!r}: must be an integer of at least 1")


def position_limit(model: Model, length: int) -> int | None:
    """How many positions the model's table of absolute positions holds; None where `length` cannot pass it.

    A table is an embedding, other than that of the tokens, with a row for each of `max_position_embeddings`
    (and a few for an offset), or a buffer with exactly that many rows. Computed positions have no end.
    """
    n_positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(n_positions, int) or length <= n_positions:
        return None
    tokens = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and id(module) not in tokens:
            tables = {module.num_embeddings - offset for offset in range(9)}
        else:
            tables = {len(buffer) for buffer in module.buffers(recurse=False) if buffer.dim() == 2}
        if n_positions in tables:
            return n_positions
    return None


def _check_ids(input_ids: Any, table: Tensor | None) -> None:
    _check_integer("input_ids", input_ids)
    if input_ids.dim() != 2:
        raise InvalidInput(f"input_ids of shape {tuple(input_ids.shape)}: must be [batch, length]")
    if input_ids.numel() == 0:
        raise InvalidInput(
            f"input_ids of shape {tuple(input_ids.shape)}: the prompt is empty, at least one token is needed"
        )
    if table is None:
        return
    smallest, largest = input_ids.aminmax()
    if smallest < 0 or largest >= len(table):
        row, column = _first((input_ids < 0) | (input_ids >= len(table)))
        raise InvalidInput(
            f"input_ids[{row}, {column}]={int(input_ids[row, column])}: must be from 0 to {len(table) - 1}, "
            "the rows of the model's token embedding"
        )


def _check_embeds(inputs_embeds: Any, table: Tensor | None) -> None:
    if not isinstance(inputs_embeds, Tensor) or not inputs_embeds.is_floating_point():
        raise InvalidInput(f"inputs_embeds: must be a floating point tensor, not {_kind(inputs_embeds)}")
    shape = tuple(inputs_embeds.shape)
    if len(shape) != 3 or (table is not None and shape[2] != table.shape[1]):
        width = "hidden_size" if table is None else table.shape[1]
        raise InvalidInput(f"inputs_embeds of shape {shape}: must be [batch, length, {width}]")
    if inputs_embeds.numel() == 0:
        raise InvalidInput(
            f"inputs_embeds of shape {shape}: the prompt is empty, at least one token is needed"
        )
    finite = torch.isfinite(inputs_embeds)
    if not finite.all():
        row, column, channel = _first(~finite)
        value = inputs_embeds[row, column, channel].item()
        raise InvalidInput(f"inputs_embeds[{row}, {column}, {channel}]={value}: must be finite")


def _check_mask(attention_mask: Any, shape: torch.Size, n_past: int) -> None:
    if not isinstance(attention_mask, Tensor) or attention_mask.is_complex():
        raise InvalidInput(f"attention_mask: must be a tensor of 0 and 1, not {_kind(attention_mask)}")
    n_rows, length = shape
    allowed = sorted({(n_rows, length), (n_rows, n_past + length)})
    if tuple(attention_mask.shape) not in allowed:
        raise InvalidInput(
            f"attention_mask of shape {tuple(attention_mask.shape)}: must be {' or '.join(map(str, allowed))}"
        )
    binary = (attention_mask == 0) | (attention_mask == 1)
    if not binary.all():
        row, column = _first(~binary)
        raise InvalidInput(
            f"attention_mask[{row}, {column}]={attention_mask[row, column].item()}: must be 0 or 1"
        )
    seen = attention_mask.any(dim=1)
    if not seen.all():
        (row,) = _first(~seen)
        raise InvalidInput(
            f"attention_mask[{row}]: all zeros, every row needs at least one token to attend to"
        )


def _check_positions(
    model: Model, length: int, attention_mask: Tensor | None, position_ids: Tensor | None
) -> None:
    largest = int(position_ids.max()) if position_ids is not None and position_ids.numel() else length - 1
    limit = position_limit(model, largest + 1)
    if limit is None:
        return
    if position_ids is not None:
        raise InvalidInput(f"position_ids: {largest} is past the last position of the model, {limit - 1}")
    n_tokens = length if attention_mask is None else int(attention_mask.sum(dim=1).max())
    if n_tokens > limit:
        raise InvalidInput(
            f"input_ids: the prompt has {n_tokens} tokens, and the model has positions for {limit}"
        )


def _check_integer(name: str, value: Any) -> None:
    if (
        not isinstance(value, Tensor)
        or value.is_floating_point()
        or value.is_complex()
        or value.dtype == torch.bool
    ):
        raise InvalidInput(f"{name}: must be a tensor of integers, not {_kind(value)}")


def _first(wrong: Tensor) -> list[int]:
    return wrong.nonzero()[0].tolist()


def _kind(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
