"""A small Llama with its tokenizer, for demonstrations and tests without a download; see `MODEL.md`."""

from pathlib import Path


def embedded_model() -> str:
    """The folder of the embedded model, as `from_pretrained` takes it."""
    return str(Path(__file__).parent)
