"""What is known of a family of decoders."""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A decoder as data.

    model_type: the configuration's. parts: regular expressions of how the path of a part ends, and the
    pattern that it matches; a part that a configuration leaves out is not missed.
    """

    name: str
    model_type: str
    parts: Mapping[str, str]

    def pattern_at(self, path: str) -> str | None:
        """Name of the pattern that the module at this path has to match; None if it is no such part."""
        parts = self.parts.items()
        return next((name for end, name in parts if re.search(rf"(^|\.){end}$", path)), None)
