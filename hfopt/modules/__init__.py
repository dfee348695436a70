"""Building blocks of models of one's own, under the names of ipex.llm.modules."""

from .mamba_mixer import MambaMixer

__all__ = ["MambaMixer"]
