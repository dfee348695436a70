"""A small Llama with its tokenizer, for demonstrations and tests without a download; see `MODEL.md`."""

from pathlib import Path


def embedded_model() -> str:
    """Folder of the embedded model, as `from_pretrained` takes it.

    Example:
        >>> import hfopt
        >>> from transformers import AutoModelForCausalLM
        >>> AutoModelForCausalLM.from_pretrained(hfopt.embedded_model()).num_parameters()
        2296064
    """
    return str(Path(__file__).parent)
