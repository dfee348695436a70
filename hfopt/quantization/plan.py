"""Which linear layer of a model gets which format."""

from collections.abc import Collection, Mapping
from typing import NamedTuple, Protocol

from hfopt.errors import InvalidInput
from hfopt.quantization.format import Format
from hfopt.quantization.packed import misfit


class Recipe(Protocol):
    """Wishes for each layer: a `QuantizationConfig` or an `HfoptConfig`."""

    def format_of(self, path: str, *, is_head: bool) -> Format | str:
        """The format for the layer at this path; or in words, why it is left."""


class Layer(NamedTuple):
    """A linear layer, as far as a plan depends on it.

    is_head: whether it gives the logits. in_decoder: whether it stands in or before them. obstacle: in words, why it cannot
    be quantised, whatever the format. packed: the format that it has already.
    """

    in_features: int
    is_head: bool = False
    in_decoder: bool = True
    obstacle: str | None = None
    packed: Format | None = None


class Plan(NamedTuple):
    """formats: of the layers that are to be quantised, by path. left: why others stay as they are."""

    formats: dict[str, Format]
    left: dict[str, str]


def plan(layers: Mapping[str, Layer], recipe: Recipe) -> Plan:
    """Choose a format for each of these layers, given by their paths, or say why it is left.

    Layers that are packed as the recipe says already are in neither part.

    Raises InvalidInput for a layer that is packed otherwise already, and for a format that no layer gets because none of
    those it is for can have it.
    """
    found = Plan({}, {})
    misfits: dict[str, tuple[Format, str]] = {}
    for path, layer in layers.items():
        if not (layer.in_decoder or layer.is_head):
            found.left[path] = "it is outside the decoder"
            continue
        format = recipe.format_of(path, is_head=layer.is_head)
        if layer.packed is not None:
            _check_same(path, layer.packed, format)
        elif isinstance(format, str):
            found.left[path] = format
        elif layer.obstacle is not None:
            found.left[path] = layer.obstacle
        elif (reason := misfit(format, layer.in_features)) is not None:
            found.left[path] = reason
            misfits[path] = format, reason
        else:
            found.formats[path] = format
    packed = (layer.packed for layer in layers.values() if layer.packed is not None)
    _check_fits({*packed, *found.formats.values()}, misfits)
    return found


def _check_same(path: str, packed: Format, format: Format | str) -> None:
    if packed != format:
        asked = f"{format} is asked for" if isinstance(format, Format) else format
        raise InvalidInput(
            f"quantization: {path} is quantised as {packed} already, but {asked}; "
            "load the model again for another config"
        )


def _check_fits(used: Collection[Format], misfits: Mapping[str, tuple[Format, str]]) -> None:
    """Raises InvalidInput for a format that is not used, because none of the layers it was for can have it."""
    for path, (format, reason) in misfits.items():
        if format not in used:
            raise InvalidInput(f"quantization: {format} fits no layer that it is for ({path}: {reason})")
