"""What one process asks of one release of transformers: every request of stock first, then of hfopt."""

import copy
import functools
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# imported by a server that all processes are forked from, which knows no transformers yet
THIRD_PARTIES = [
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "torch.export",
    "numba",
    "pytest",
    "tests.tomorrow_requests",
]
ENDS = list(range(5, 205, 6))
SCORES = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
INSIDE = {"return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True}

# request -> (mode, arguments); prompts are padded where there are several rows
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("greedy", SCORES),
    "greedy, one row": ("greedy", {"n_rows": 1, "max_new_tokens": 12}),
    "greedy to an end": ("greedy", {"eos_token_id": ENDS}),
    "greedy, looked into": ("greedy", {"attention": "eager", **INSIDE}),
    "greedy, read by others": ("greedy", {"is_read": True}),
    "greedy, continued": ("greedy", {"is_continued": True}),
    "sampling": ("sampling", {"do_sample": True, "num_return_sequences": 2, **SCORES}),
    "sampling to an end": ("sampling", {"do_sample": True, "temperature": 2.0, "eos_token_id": ENDS}),
    "beams": ("beams", {"num_beams": 3, "num_return_sequences": 2, **SCORES}),
    "beams, one row": ("beams", {"num_beams": 4, "n_rows": 1, "max_new_tokens": 12}),
    "beams to an end": (
        "beams",
        {"num_beams": 2, "eos_token_id": ENDS, "length_penalty": 2.0, "max_new_tokens": 12, **SCORES},
    ),
    "beams, never stopping early": (
        "beams",
        {"num_beams": 3, "eos_token_id": ENDS, "early_stopping": "never", "length_penalty": 1.5, **SCORES},
    ),
    "beams of equal candidates": (
        "beams",
        {"num_beams": 3, "num_return_sequences": 3, "has_ties": True, **SCORES},
    ),
    "beams of equal candidates, tokens only": (
        "beams",
        {"num_beams": 3, "num_return_sequences": 3, "has_ties": True},
    ),
    "beams, looked into": ("beams", {"num_beams": 2, "attention": "eager", **INSIDE}),
    "beams, read by others": ("beams", {"num_beams": 2, "is_read": True}),
    "beams, continued": ("beams", {"num_beams": 2, "is_continued": True}),
    "beam sampling": (
        "beam sampling",
        {"num_beams": 3, "do_sample": True, "num_return_sequences": 2, **SCORES},
    ),
    "beam sampling to an end": (
        "beam sampling",
        {"num_beams": 3, "do_sample": True, "eos_token_id": ENDS, "early_stopping": True},
    ),
}


def answer(release: str, path: str) -> None:
    """Ask the release in this folder ("": the installed one); `path` will have the answers, as JSON."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    assert "transformers" not in sys.modules and "hfopt" not in sys.modules
    if release:
        sys.path.insert(0, release)
    import torch

    torch.set_num_threads(1)
    records = _Records()
    logging.getLogger("hfopt").addHandler(records)
    found: dict[str, Any] = {"families": {}, "records": records.found, "broken": None}
    try:
        found |= _answers(is_installed=not release)
    except Exception:  # noqa: BLE001  (whatever a release does)
        found["broken"] = traceback.format_exc()
    Path(path).write_text(json.dumps(found))


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.found: list[dict[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append({"logger": record.name, "level": record.levelname, "message": record.getMessage()})


def _answers(is_installed: bool) -> dict[str, Any]:
    import transformers

    from tests.generation_cases import FAMILIES

    found: dict[str, Any] = {"release": transformers.__version__, "families": {}}
    models = {family: (make(), _with_ties(make())) for family, make in FAMILIES.items()}
    stock = {family: _outcomes(*copy.deepcopy(pair)) for family, pair in models.items()}
    for family, outcomes in stock.items():
        requests = {
            name: {
                "mode": _mode(name),
                "stock": _shown(outcome),
                "reorders": _reorders(outcome),
                "difference": None,
            }
            for name, outcome in outcomes.items()
        }
        found["families"][family] = {"requests": requests, "report": "", "broken": None}
    assert "hfopt" not in sys.modules
    try:
        import hfopt
        from hfopt.machine import private_file
    except Exception:  # noqa: BLE001
        return {**found, "broken": traceback.format_exc()}
    if not is_installed:  # what is found out here is of no use to this machine
        vars(private_file)["write"] = lambda *args: None
    steps = _program_steps()
    for family, pair in models.items():
        entry = found["families"][family]
        try:
            entry["strict"] = _refusal(hfopt, copy.deepcopy(pair[0]))
            for model in pair:
                hfopt.optimize(model, kernels="hfopt")
            steps.clear()
            outcomes = _outcomes(*pair)
            entry["takes_steps"] = any(steps)
            report = hfopt.explain(pair[0])
            entry |= {"report": str(report), **report.to_dict()}
        except Exception:  # noqa: BLE001
            entry["broken"] = traceback.format_exc()
            continue
        for name, outcome in outcomes.items():
            entry["requests"][name]["difference"] = difference(outcome, stock[family][name])
    return found


def _program_steps() -> list[bool]:
    """Whether a program has made each step that it was asked for, from now on."""
    from hfopt.generation.decoding import Decoding

    found: list[bool] = []

    def noted(step: Any) -> Any:
        def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
            outputs = step(self, *args, **kwargs)
            found.append(outputs is not None)
            return outputs

        return noting

    Decoding.logits = noted(Decoding.logits)  # type: ignore[method-assign]
    Decoding.choose = noted(Decoding.choose)  # type: ignore[method-assign]
    return found


def _refusal(hfopt: Any, model: Any) -> str | None:
    """What `strict` says against this model, if anything."""
    try:
        hfopt.optimize(model, strict=True, kernels="hfopt")
    except hfopt.UnsupportedModel as error:
        return str(error)
    return None


def _with_ties(model: Any) -> Any:
    """Let each logit be one channel of the last hidden state, so that those of many tokens are equal to the bit."""
    import torch

    weight = torch.zeros_like(model.lm_head.weight)
    weight[torch.arange(len(weight)), torch.arange(len(weight)) % weight.shape[1]] = 4.0
    model.lm_head.weight = torch.nn.Parameter(weight)  # not that of the tied embedding
    if model.lm_head.bias is not None:
        torch.nn.init.zeros_(model.lm_head.bias)
    return model


# ---- requests ----------------------------------------------------------------------------------------------


def _mode(request: str) -> str:
    return REQUESTS[request][0] if request in REQUESTS else "forward"


def _outcomes(model: Any, model_with_ties: Any) -> dict[str, Any]:
    """What becomes of each request: a value, or the exception that it raised."""
    import torch

    found: dict[str, Any] = {"forward": _outcome(functools.partial(_forward, model))}
    for name, (_, arguments) in REQUESTS.items():
        asked = model_with_ties if "has_ties" in arguments else model
        given = {key: value for key, value in arguments.items() if key != "has_ties"}
        torch.manual_seed(3)
        found[name] = _outcome(functools.partial(_request, asked, **given))
        if given.get("do_sample"):
            found[name] = (found[name], torch.rand(()))  # whether as many random numbers were taken
    return found


def _outcome(ask: Callable[[], Any]) -> Any:
    import torch

    try:
        with torch.no_grad():
            return ask()
    except Exception as error:  # noqa: BLE001  (stock's are compared with ours)
        return error


def _forward(model: Any) -> Any:
    """Outputs for a padded prompt, and for one more token behind its cache."""
    import torch

    from tests.generation_cases import prompts

    given = prompts()
    first = model(**given, use_cache=True)
    mask = torch.cat([given["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
    name, cache = _cache(first)
    position_ids = given["attention_mask"].sum(1, keepdim=True)
    valid = _logits(first)[given["attention_mask"].bool()]
    second = model(
        input_ids=given["input_ids"][:, -1:], attention_mask=mask, position_ids=position_ids, **{name: cache}
    )
    return valid, _logits(second), _defined(cache, 3)


def _request(
    model: Any,
    *,
    n_rows: int = 3,
    is_read: bool = False,
    is_continued: bool = False,
    attention: str = "",
    **arguments: Any,
) -> Any:
    import torch

    from tests.generation_cases import prompts

    if attention:
        before = model.config._attn_implementation
        model.set_attn_implementation(attention)
        try:
            return _request(model, n_rows=n_rows, **arguments)
        finally:
            model.set_attn_implementation(before)
    given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **arguments}
    if is_read:
        return _read(model, n_rows, given)
    if n_rows == 1:  # nothing is padded, and the prompt is given by position
        return _defined(model.generate(prompts(1)["input_ids"], **given), 1)
    if not is_continued:
        return _defined(model.generate(**prompts(n_rows), **given), n_rows)
    first = model.generate(**prompts(n_rows), **{**given, "max_new_tokens": 5}, return_dict_in_generate=True)
    # all beams of a prompt go on, each for itself; keys are read by modules that are looked into, too
    name, cache = _cache(first)
    read = _defined(first, n_rows)
    n_new = first.sequences.shape[1] - prompts(n_rows)["input_ids"].shape[1]
    copies = given.get("num_beams", 1)
    mask = prompts(n_rows)["attention_mask"].repeat_interleave(copies, 0)
    mask = torch.cat([mask, torch.ones(len(mask), n_new, dtype=torch.long)], dim=1)
    sequences = first.sequences.repeat_interleave(copies, 0)
    second = model.generate(
        sequences,
        attention_mask=mask,
        **{**given, "num_beams": 1},
        **{name: cache},
        return_dict_in_generate=True,
        output_hidden_states=True,
    )
    return read, _defined(second, n_rows)


def _read(model: Any, n_rows: int, given: dict[str, Any]) -> Any:
    """A request with parts of others: a processor, a criterion, a streamer where there can be one."""
    import torch
    from transformers import LogitsProcessor, StoppingCriteria

    from tests.generation_cases import prompts

    class Favour(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return scores + 2.0 * (torch.arange(scores.shape[-1]) % 7 == input_ids.shape[1] % 7)

    class Full(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return (input_ids[:, -6:] % 2).sum(-1) >= 5

    class Pieces:
        def __init__(self) -> None:
            self.found: list[Any] = []

        def put(self, value: Any) -> None:
            self.found.append(value.clone())

        def end(self) -> None:
            self.found.append(None)

    pieces = Pieces()
    streams = {} if given.get("num_beams", 1) > 1 else {"streamer": pieces}
    outputs = model.generate(
        **prompts(n_rows), **given, logits_processor=[Favour()], stopping_criteria=[Full()], **streams
    )
    return outputs, tuple(pieces.found)


def _cache(outputs: Any) -> tuple[str, Any]:
    from transformers import Cache

    return next((name, value) for name, value in outputs.items() if isinstance(value, Cache))


def _logits(outputs: Any) -> Any:
    """The first of the outputs that has a number for each token of the vocabulary."""
    from tests.generation_cases import VOCABULARY

    return next(value for value in outputs.values() if getattr(value, "shape", (0,))[-1] == VOCABULARY)


def _defined(outputs: Any, n_rows: int) -> Any:
    """A copy that says nothing of padded positions, where releases and kernels may write what they like.

    A cache, of whatever class, becomes its keys and values.
    """
    from transformers import Cache

    from tests.generation_cases import prompts

    mask = prompts(n_rows)["attention_mask"]

    def copied(value: Any, name: str) -> Any:
        if isinstance(value, Cache):
            layers: list[Any] = value.layers
            return {"a cache": [(cleared(layer.keys, 2), cleared(layer.values, 2)) for layer in layers]}
        if hasattr(value, "items"):
            return {"class": type(value).__name__} | {key: copied(each, key) for key, each in value.items()}
        if isinstance(value, (tuple, list)):
            return tuple(copied(each, name) for each in value)
        axis = {"hidden_states": 1, "attentions": 2}.get(name)
        return value if axis is None or value is None else cleared(value, axis)

    def cleared(value: Any, axis: int) -> Any:
        if value.shape[axis] < mask.shape[1]:
            return value.clone()  # of a later step
        value, rows = value.clone(), mask.repeat_interleave(len(value) // n_rows, 0)
        for row, n_padded in enumerate((rows == 0).sum(1).tolist()):
            value[row].narrow(axis - 1, 0, n_padded).zero_()
        return value

    return copied(outputs, "")


# ---- comparison --------------------------------------------------------------------------------------------


def difference(ours: Any, stock: Any) -> str | None:
    """In words, where two outcomes differ first."""
    import torch

    if type(ours) is not type(stock):
        return f"{_kind(ours)} instead of {_kind(stock)}"
    if isinstance(stock, torch.Tensor):
        return _tensor_difference(ours, stock)
    if isinstance(stock, dict):
        if list(ours) != list(stock):
            return f"fields {list(ours)} instead of {list(stock)}"
        named = ((name, ours[name], stock[name]) for name in stock)
    elif isinstance(stock, (tuple, list)):
        if len(ours) != len(stock):
            return f"{len(ours)} values instead of {len(stock)}"
        named = ((str(n), *pair) for n, pair in enumerate(zip(ours, stock, strict=True)))
    else:
        return None if isinstance(stock, Exception) or ours == stock else f"{ours} instead of {stock}"
    for name, our, their in named:
        found = difference(our, their)
        if found is not None:
            return f"{name}: {found}"
    return None


def _tensor_difference(ours: Any, stock: Any) -> str | None:
    import torch

    if ours.dtype != stock.dtype or ours.shape != stock.shape:
        return f"{ours.dtype} {list(ours.shape)} instead of {stock.dtype} {list(stock.shape)}"
    if not stock.is_floating_point():
        return None if torch.equal(ours, stock) else f"{ours.tolist()} instead of {stock.tolist()}"
    if torch.allclose(ours, stock, rtol=1e-3, atol=1e-3, equal_nan=True):
        return None
    return f"numbers differ by up to {float((ours - stock).abs().max()):.2g}"


def _kind(value: Any) -> str:
    return f"{type(value).__name__}: {value}" if isinstance(value, Exception) else type(value).__name__


def _shown(outcome: Any) -> Any:
    """What JSON can have of an outcome: its tokens, or the exception."""
    import torch

    if isinstance(outcome, Exception):
        return _kind(outcome)
    if isinstance(outcome, dict):
        return _shown(outcome.get("sequences"))
    if isinstance(outcome, tuple):
        return [_shown(each) for each in outcome]
    if isinstance(outcome, torch.Tensor) and not outcome.is_floating_point():
        return outcome.tolist()
    return None


def _reorders(outcome: Any) -> bool:
    """Whether a beam grew from another one than itself."""
    if isinstance(outcome, tuple):
        outcome = outcome[0]
    indices = outcome.get("beam_indices") if isinstance(outcome, dict) else None
    return indices is not None and bool((indices[:, 1:] != indices[:, :-1]).any())
