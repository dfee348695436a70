"""What is known of a family of decoders."""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Decoder:
    """How a model puts its modules together: names of the children of the module at `path`.

    What a token looks up in `tokens` goes through `project_in`, is added to what its position looks up in `positions`,
    and goes through `layers`, `norm`, `project_out`, and the model's own child `head`. A part that is None in a family,
    or in a model, is left out. rotary: computes cos and sin for all layers.
    """

    path: str
    tokens: str
    layers: str
    norm: str
    head: str = "lm_head"
    rotary: str | None = None
    positions: str | None = None
    project_in: str | None = None
    project_out: str | None = None


@dataclass(frozen=True)
class Family:
    """A decoder as data.

    model_types: of configurations. parts: regular expressions of how the path of a part ends, and the
    pattern that it matches; a part that a configuration leaves out is not missed.
    """

    name: str
    model_types: tuple[str, ...]
    parts: Mapping[str, str]
    decoder: Decoder

    def pattern_at(self, path: str) -> str | None:
        """Name of the pattern that the module at this path has to match; None if it is no such part."""
        parts = self.parts.items()
        return next((name for end, name in parts if re.search(rf"(^|\.){end}$", path)), None)
