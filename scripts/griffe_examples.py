"""For the pages of the reference: docstrings say `Example:` where mkdocstrings' parser knows `Examples:`."""

import re
from typing import Any

import griffe

_TITLE = re.compile(r"^Example:$", re.MULTILINE)


class Examples(griffe.Extension):
    """Renames the section, so that its lines become code."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Called for each object that has been read."""
        if obj.docstring is not None:
            obj.docstring.value = _TITLE.sub("Examples:", obj.docstring.value)
