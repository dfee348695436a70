"""For the pages of the reference: makes of every example in a docstring a section that mkdocstrings' parser knows."""

import re
import textwrap
from typing import Any

import griffe

_TITLE = re.compile(r"^Example:$", re.MULTILINE)
_BARE = re.compile(r"^>>> .*\Z", re.MULTILINE | re.DOTALL)


class Examples(griffe.Extension):
    """`Example:` becomes `Examples:`, and an example without a title gets it; the parser then shows code as code."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Called for each object that has been read."""
        if obj.docstring is not None:
            text = _BARE.sub(
                lambda match: f"Examples:\n{textwrap.indent(match[0], '    ')}", obj.docstring.value
            )
            obj.docstring.value = _TITLE.sub("Examples:", text)
