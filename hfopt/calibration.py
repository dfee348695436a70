"""Calibration: what the inputs of linear layers are like while a model reads given texts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from hfopt.errors import InvalidInput
from hfopt.host import Features, vocabulary
from hfopt.progress import progress
from hfopt.quantization import InputStatistics, block_inputs
from hfopt.words import first_line

logger = logging.getLogger(__name__)

Calibration = Sequence[str | Sequence[int] | torch.Tensor]  # what users give

# Tokens that are read together; longer texts are cut
_PIECE = 512
# Bytes of the products of inputs that are in memory at a time; for more, the texts are read again
_BUDGET = 1 << 28


class Calibrator:
    """Reads texts with a model.

    Args:
        model: a model of transformers, or something that holds one.
        texts: see `hfopt.optimize`.
        options: of `AutoTokenizer.from_pretrained`, for texts that are no token ids.

    Raises InvalidInput for anything but a list of texts that the model can read.
    """

    def __init__(self, model: nn.Module, texts: Any, **options: Any) -> None:
        found = (module for module in model.modules() if isinstance(module, PreTrainedModel))
        self._model = next(found, None)
        if self._model is None:
            raise InvalidInput(f"calibration needs a model of transformers, not a {type(model).__name__}")
        if isinstance(texts, str | torch.Tensor) or not isinstance(texts, Sequence):
            raise InvalidInput(
                f"calibration is a {type(texts).__name__}: a list of texts or of token ids is needed"
            )
        if not texts:
            raise InvalidInput("calibration is empty: at least one text is needed")
        config = self._model.config.get_text_config(decoder=True)
        piece = min(_PIECE, getattr(config, "max_position_embeddings", None) or _PIECE)
        self._pieces = [
            each for ids in _token_ids(self._model, texts, options) for each in ids.split(piece, dim=1)
        ]

    def measure(self, linears: Mapping[str, nn.Module]) -> Iterator[dict[str, InputStatistics | None]]:
        """The inputs of these layers, by their names; of as many layers at a time as memory is for.

        None for a layer that no text has reached. What is packed between two steps takes part in the next ones.
        """
        # a model that cannot read fails here, before anything is packed
        return self._measure(linears, self._sharing(linears))

    def _measure(
        self, linears: Mapping[str, nn.Module], sharing: Mapping[str, list[str]]
    ) -> Iterator[dict[str, InputStatistics | None]]:
        batch: dict[str, list[str]] = {}
        size = 0
        for owner, names in sharing.items():
            in_features = Features.of(linears[owner]).inputs
            n_bytes = in_features * block_inputs(in_features) * 4
            if batch and size + n_bytes > _BUDGET:
                yield self._observe(linears, batch)
                batch, size = {}, 0
            batch[owner] = names
            size += n_bytes
        if batch:
            yield self._observe(linears, batch)

    def _sharing(self, linears: Mapping[str, nn.Module]) -> dict[str, list[str]]:
        """Layers that are given the same tensor (q, k and v), under the name of the first."""
        owners: dict[str, str] = {}
        last: list[Any] = [None, ""]

        def note(name: str, x: torch.Tensor) -> None:
            if x is not last[0]:
                last[:] = x, name
            owners.setdefault(name, last[1])

        hooks = {name: (linear, note) for name, linear in linears.items()}
        self._read([self._pieces[0][:, :1]], hooks, lambda: None)
        shared: dict[str, list[str]] = {}
        for name in linears:
            shared.setdefault(owners.get(name, name), []).append(name)
        return shared

    def _observe(
        self, linears: Mapping[str, nn.Module], batch: Mapping[str, list[str]]
    ) -> dict[str, InputStatistics | None]:
        products: dict[str, torch.Tensor] = {}
        counts = dict.fromkeys(batch, 0)

        def add(name: str, x: torch.Tensor) -> None:
            block = block_inputs(x.shape[-1])
            blocks = x.reshape(-1, x.shape[-1] // block, block).transpose(0, 1).float()
            if name not in products:
                products[name] = torch.zeros(len(blocks), block, block)
            products[name].baddbmm_(blocks.mT, blocks)
            counts[name] += blocks.shape[1]

        with progress("hfopt reads texts for calibration", len(self._pieces), "texts") as advance:
            self._read(self._pieces, {owner: (linears[owner], add) for owner in batch}, advance)
        result: dict[str, InputStatistics | None] = {}
        for owner, names in batch.items():
            statistics = None
            if counts[owner]:
                try:
                    statistics = InputStatistics.of(products.pop(owner), counts[owner])
                except InvalidInput:
                    logger.warning("calibration: what %s is given is not finite, and not used", owner)
            result.update(dict.fromkeys(names, statistics))
        return result

    @torch.no_grad()
    def _read(
        self,
        pieces: Sequence[torch.Tensor],
        hooks: Mapping[str, tuple[nn.Module, Callable[[str, torch.Tensor], None]]],
        advance: Callable[[], None],
    ) -> None:
        """Let the model read, and tell what the layers are given. advance: called after each piece."""
        model: Any = self._model
        with _evaluation(model), _hooked(hooks):
            for piece in pieces:
                model(input_ids=piece, use_cache=False)
                advance()


@contextmanager
def _hooked(hooks: Mapping[str, tuple[nn.Module, Callable[[str, torch.Tensor], None]]]) -> Iterator[None]:
    def hook(name: str, function: Callable[[str, torch.Tensor], None]) -> Callable[..., None]:
        return lambda module, args, kwargs: function(name, args[0] if args else next(iter(kwargs.values())))

    handles = [
        module.register_forward_pre_hook(hook(name, function), with_kwargs=True)
        for name, (module, function) in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Turn dropout off in the block; every module is in its own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _token_ids(
    model: PreTrainedModel, texts: Sequence[Any], options: Mapping[str, Any]
) -> Iterator[torch.Tensor]:
    """Token ids of every text, [1, tokens]."""
    n_ids = vocabulary(model)
    tokenizer: Any = None
    for index, text in enumerate(texts):
        name = f"calibration[{index}]"
        if isinstance(text, str):
            tokenizer = tokenizer or _tokenizer(model, options)
            ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
        else:
            ids = _integers(name, text)
        if ids.numel() == 0:
            raise InvalidInput(f"{name} is empty: at least one token is needed")
        if ids.ndim not in (1, 2):
            raise InvalidInput(
                f"{name} has shape {list(ids.shape)}: token ids [tokens] or [rows, tokens] are needed"
            )
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= n_ids:
            raise InvalidInput(
                f"{name} holds id {low if low < 0 else high}: ids from 0 to {n_ids - 1} are known"
            )
        yield from ids.view(-1, ids.shape[-1]).split(1)


def _integers(name: str, values: Any) -> torch.Tensor:
    try:
        ids = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{name} is a {type(values).__name__}: a text or token ids are needed") from error
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool):
        raise InvalidInput(f"{name} holds {ids.dtype}: a text or token ids are needed")
    return ids.detach().to("cpu", torch.int64)


def _tokenizer(model: PreTrainedModel, options: Mapping[str, Any]) -> Any:
    """Tokenizer of the folder or id that the model comes from."""
    source = model.config.name_or_path
    hint = "give token ids in place of texts"
    if not source:
        raise InvalidInput(
            f"calibration holds texts, and the model comes from no folder with a tokenizer: {hint}"
        )
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        raise InvalidInput(
            f"calibration holds texts, and {source} has no tokenizer ({first_line(error)}): {hint}"
        ) from error
