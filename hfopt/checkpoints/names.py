"""Names of a checkpoint's tensors in a model, where transformers builds it otherwise than it was saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from hfopt.errors import UnsupportedModel

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist

    CONVERTS = True
except ImportError:  # transformers 4 builds models as they were saved
    CONVERTS = False


class Parts(NamedTuple):
    """The keys of tensors that become one: those of a row are concatenated, along their first dimension.

    is_stacked: the rows become the first dimension (of experts); else there is one row.
    """

    rows: list[list[str]]
    is_stacked: bool


class Places(NamedTuple):
    """Places of the tensors of a checkpoint in a model.

    keys: by the names that tensors have in the model. parts: the same for tensors that are made of several. unexpected:
    keys that have no place.
    """

    keys: dict[str, str]
    parts: dict[str, Parts]
    unexpected: list[str]


class Matching:
    """Finds the places of a checkpoint's tensors. has_place: whether a model has one for a name."""

    def __init__(self, model: PreTrainedModel, has_place: Callable[[str], bool]) -> None:
        self._prefix = model.base_model_prefix + "."
        self._has_place = has_place
        self._transforms: list[Any] = get_model_conversion_mapping(model) if CONVERTS else []

    def places(self, keys: Iterable[str]) -> Places:
        """Match keys to names; raises UnsupportedModel for tensors that become others but by being put together."""
        places = Places({}, {}, [])
        groups: dict[str, tuple[Any, dict[str, list[str]]]] = {}
        for key in sorted(keys, key=_in_order):
            name, converter, pattern = self._place(key)
            if name is None:
                places.unexpected.append(key)
            elif converter is None:
                places.keys[name] = key
            else:
                groups.setdefault(name, (converter, {}))[1].setdefault(pattern, []).append(key)
        for name, (converter, found) in groups.items():
            places.parts[name] = _parts(name, converter, found)
        return places

    def name_of(self, key: str) -> str | None:
        """The name of a tensor in the model; None if it has no place there, or becomes a part of another one."""
        name, converter, _ = self._place(key)
        return name if converter is None else None

    def is_converted(self, key: str) -> bool:
        """Whether the tensor would be a part of another one."""
        return self._rename(key)[1] is not None

    def _place(self, key: str) -> tuple[str | None, Any, str]:
        """`_rename`, for names that the model has; (None, None, "") without a place."""
        renamed, converter, pattern = self._rename(key)
        name = self._placed(renamed)
        return (self._placed(key), None, "") if name is None else (name, converter, pattern)

    def _rename(self, key: str) -> tuple[str, Any, str]:
        """(new name, what converts the tensor or None, which pattern of that the name has)."""
        for transform in self._transforms:
            if not hasattr(transform, "operations"):
                key, _ = transform.rename_source_key(key)
        for transform in self._transforms:
            if hasattr(transform, "operations"):
                renamed, pattern = transform.rename_source_key(key)
                if pattern is not None:
                    return renamed, transform, pattern
        return key, None, ""

    def _placed(self, name: str) -> str | None:
        """The name with or without the prefix of the base model, as the model has it."""
        names = name, self._prefix + name, name.removeprefix(self._prefix)
        return next((name for name in names if self._has_place(name)), None)


def _in_order(key: str) -> list[tuple[int, int, str]]:
    """Numbers by size, the tenth expert behind the second."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


def _parts(name: str, converter: Any, found: dict[str, list[str]]) -> Parts:
    groups = [found[pattern] for pattern in converter.source_patterns if pattern in found]
    steps = [
        (type(operation), operation.dim) for operation in converter.operations if hasattr(operation, "dim")
    ]
    is_stacked = steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
    if len(steps) != len(converter.operations) or not (is_stacked or steps == [(Concatenate, 0)]):
        raise UnsupportedModel(
            f"{name} is made of {groups[0][0]!r} by {converter.operations}, which hfopt.load does not do; load the model "
            "by from_pretrained"
        )
    if not is_stacked:
        return Parts([[key for group in groups for key in group]], is_stacked)
    return Parts([list(row) for row in zip(*groups, strict=False)], is_stacked)
