"""The scene of a proof: small random inputs of modules, the same ones for the original and the replacement."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from hfopt.cache import IndirectCache
from hfopt.host import rotary as host_rotary
from hfopt.patches.angles import is_pair
from hfopt.patches.attention import Given
from hfopt.patches.slopes import bias_of, ranked_bias_of, with_bias
from hfopt.patches.stored import Stored

# Two rows, the second padded on the left, then one more token, then many behind a long text. Gaps between positions turn
# more channels; few tokens, because the mean over many would hide what one changes.
_PREFILL_POSITIONS = torch.tensor([[0, 1, 3, 7, 12], [1, 1, 0, 2, 5]])
_STEP_POSITIONS = torch.tensor([[20], [9]])
_FAR_POSITIONS = torch.arange(20) + torch.tensor([[3000], [1800]])
_N_PADDED = 2
_FAR = 1024  # keys and values of a long text, at least
_LENGTH = 0.8  # of angles
TABLE = "embed_positions"  # a buffer that has the angles of as many positions as it has rows


def shaken(numbers: torch.Tensor) -> torch.Tensor:
    """The same numbers, half of them changed in the last bit."""
    numbers = numbers.clone()
    numbers[..., ::2] *= 1 + torch.finfo(numbers.dtype).eps
    return numbers


@dataclass(frozen=True)
class Inputs:
    """Inputs of a forward: hidden_states [2, n_new, hidden_size], a mask, position_ids [2, n_new]. is_padded: the first
    tokens of the second row are padding."""

    hidden_states: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    is_padded: bool

    def valid(self, output: torch.Tensor) -> torch.Tensor:
        """The output, without that of the padding (which has to be finite all the same)."""
        if not self.is_padded or not bool(output.isfinite().all()):
            return output
        return torch.cat([output[0], output[1, _N_PADDED:]])


class Scene:
    """The inputs of one trial. A second scene with the same arguments gives the same ones.

    takes_flags: masks may say by True what is seen, as well as by numbers that are added.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        scale: float,
        cache: DynamicCache,
        rotary: nn.Module | None,
        *,
        takes_flags: bool = False,
        shaken: bool = False,
    ) -> None:
        self.cache = cache
        self._takes_flags = takes_flags
        self._shaken = shaken
        self._dtype = dtype
        self._scale = scale
        self.rotary_module = rotary
        self._generator = torch.Generator().manual_seed(1)

    def hidden_states(self, *shape: int) -> torch.Tensor:
        """Random normal numbers times the scale; a shaken scene changes half of them in the last bit."""
        numbers = (torch.randn(shape, generator=self._generator) * self._scale).to(self._dtype)
        return shaken(numbers) if self._shaken else numbers

    def rotary(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> Any:
        """What the model's own rotary module gives for these positions, for layers of a type where it has several."""
        assert self.rotary_module is not None
        table = self.rotary_module._buffers.get(TABLE)
        if table is not None:
            position_ids = position_ids % len(table)
        angles = host_rotary.angles(self.rotary_module, hidden_states, position_ids, layer_type)
        # of another length, as some rotary modules give: they tell a norm before the rotation from one behind it
        return tuple(each * _LENGTH for each in angles) if is_pair(angles) else angles

    def roles(self, inputs: Inputs, given: Given) -> dict[str, Any]:
        """What attention is given besides hidden states, by role."""
        n_positions, mask = given.n_positions, inputs.attention_mask
        position_ids = inputs.position_ids if n_positions is None else inputs.position_ids % n_positions
        roles: dict[str, Any] = {"attention_mask": mask, "cache": self.cache, "position_ids": position_ids}
        if given.hides:
            roles["attention_mask"] = mask != 0
        roles["position_bias"] = None
        roles["shared"] = {}
        if given.heads is not None:
            roles["shared"][given.layer_type] = self._stored(inputs, *given.heads)
        if given.n_slopes:
            bias = bias_of(given.n_slopes, mask.shape[-1], self._dtype)
            roles["position_bias"] = bias.repeat(1 if given.hides else len(mask), 1, 1)
        if given.ranks is not None:
            seen = mask[:, 0] if mask.dtype is torch.bool else mask[:, 0] == 0
            bias = ranked_bias_of(given.ranks.n_heads, seen[:, -1], self._dtype)
            roles["position_bias"] = bias
            roles["attention_mask"] = with_bias(seen, bias, given.ranks.head_dim)
        if n_positions is None and self.rotary_module is not None:
            roles["position_embeddings"] = self.rotary(
                inputs.hidden_states, inputs.position_ids, given.layer_type
            )
        return roles

    def _stored(self, inputs: Inputs, n_heads: int, head_dim: int) -> Any:
        """Random keys and values of new tokens, stored in the first layer."""
        n_rows, n_new, _ = inputs.hidden_states.shape
        shape = 2, n_rows, n_heads, n_new, head_dim
        keys, values = torch.randn(shape, generator=self._generator).to(self._dtype)
        pair = self.cache.update(keys, values, 0)
        layer: Any = self.cache.layers[0]
        return Stored(layer, layer.appended(n_new, 0)) if isinstance(self.cache, IndirectCache) else pair

    def inputs(self, hidden_size: int, max_keys: int) -> Iterator[Inputs]:
        """Five tokens in two rows, two of them padding, then one more in each, then twenty behind a long text, no more than
        max_keys in all.
        """
        n_far = _FAR_POSITIONS.shape[1]
        n_prompt = _PREFILL_POSITIONS.shape[1]
        for positions in (_PREFILL_POSITIONS, _STEP_POSITIONS, _FAR_POSITIONS):
            n_new = positions.shape[1]
            n_past = max((keys.shape[2] for _, keys, _ in self.cached()), default=0)
            is_seen = torch.ones(2, 1, n_new, n_past + n_new, dtype=torch.bool).tril_(n_past)
            is_seen[1, :, :, :_N_PADDED] = False
            hidden_states = self.hidden_states(*positions.shape, hidden_size)
            yield Inputs(hidden_states, self._mask(is_seen, n_past), positions.clone(), n_past == 0)
            if n_past == n_prompt:
                self._lengthen(max_keys - n_far)

    def _mask(self, is_seen: torch.Tensor, n_past: int) -> torch.Tensor:
        if self._takes_flags and n_past % 2 == 0:
            # what a token gets that sees nothing depends on the implementation
            return is_seen | torch.eye(is_seen.shape[2], is_seen.shape[3], dtype=torch.bool)
        mask = torch.zeros(is_seen.shape, dtype=self._dtype)
        return mask.masked_fill(~is_seen, torch.finfo(self._dtype).min)

    def cached(self) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """(index of a layer, its keys, its values) of the layers that hold tokens."""
        layers: list[Any] = self.cache.layers
        found = ((index, layer.keys, layer.values) for index, layer in enumerate(layers))
        return [each for each in found if each[1] is not None and each[1].numel()]

    def _lengthen(self, max_keys: int) -> None:
        """What is cached once more, many times: the same keys, and values that are a little different each time."""
        for index, keys, values in self.cached():
            n_copies = min(-(-_FAR // keys.shape[2]), max_keys // keys.shape[2] - 1)
            if n_copies < 1:
                continue
            factors = 0.5 + torch.rand(n_copies * keys.shape[2], 1, generator=self._generator)
            values = values.repeat(1, 1, n_copies, 1) * factors.to(self._dtype)
            self.cache.update(keys.repeat(1, 1, n_copies, 1), values, index)
