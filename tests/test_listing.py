"""What people read of a program: its lines as text, and the bytes of a step."""

import dataclasses
from typing import Any

import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import hfopt
from hfopt.bench import roofline
from hfopt.program.listing import Line, Listing
from tests.step_cases import programs_of

LINE = Line("linear", None, "8 → 8", "silu", (0,), 64, n_bytes=128)


def listing(*instructions: Line) -> Listing:
    return Listing(instructions, sum(each.n_bytes for each in instructions), 1536, 3 << 20)


def in_layers(*layers: int | None, **changes: Any) -> list[Line]:
    return [dataclasses.replace(LINE, layer=layer, **changes) for layer in layers]


def headings(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("layer")]


def test_layers_that_do_the_same_are_folded() -> None:
    program = listing(*in_layers(None, 0, 1, 2, None))
    lines = program.lines()
    assert headings(lines) == ["layer 0", "layers 1-2 as layer 0"]
    assert [line.split()[0] for line in lines[2:-2] if "linear" in line] == ["0", "1", "4"]
    assert str(program) == "\n".join(lines)
    assert headings(program.lines(folded=False)) == ["layer 0", "layer 1", "layer 2"]


def test_other_scratch_is_no_other_layer() -> None:
    program = listing(*in_layers(0), *in_layers(1, reads=(64,), writes=0))
    assert headings(program.lines()) == ["layer 0", "layer 1 as layer 0"]


@pytest.mark.parametrize("change", [{"name": "attend"}, {"shapes": "8 → 9"}, {"then": ""}, {"n_bytes": 1}])
def test_a_layer_that_differs_is_shown(change: dict[str, Any]) -> None:
    program = listing(*in_layers(0, 1), *in_layers(2, **change), *in_layers(3, 4))
    assert headings(program.lines()) == [
        "layer 0",
        "layer 1 as layer 0",
        "layer 2",
        "layer 3",
        "layer 4 as layer 3",
    ]


def test_columns_are_aligned_and_sizes_have_units() -> None:
    wide = dataclasses.replace(LINE, n_bytes=3 << 20, reads=(0, 64), writes=None)
    lines = listing(LINE, wide, dataclasses.replace(LINE, n_bytes=0, reads=())).lines()
    assert lines[2:5] == [
        "0  linear     8 → 8   silu    128 B  0 → 64",
        "1  linear     8 → 8   silu  3.0 MiB  0, 64 → logits",
        "2  linear     8 → 8   silu           → 64",
    ]
    assert lines[-2:] == [
        "3 instructions, 3.0 MiB of weights a step",
        "each row: 1.5 KiB of scratch, 3.0 MiB of keys and values a token",
    ]


def test_what_is_read_grows_with_rows_and_context() -> None:
    line = dataclasses.replace(LINE, row_bytes=10, token_bytes=3)
    assert line.bytes_read(1, 0) == 138
    assert line.bytes_read(4, 5) == 128 + 4 * (10 + 5 * 3)


# ---- of models -------------------------------------------------------------------------------------------------------


def models() -> dict[str, Any]:
    llama: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    opt: dict[str, Any] = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    gptj: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**llama, vocab_size=99, tie_word_embeddings=False)),
        "gptj": GPTJForCausalLM(GPTJConfig(**gptj, vocab_size=99, bos_token_id=0, eos_token_id=0)),
        "opt": OPTForCausalLM(OPTConfig(**opt, vocab_size=99, word_embed_proj_dim=64)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gptj", "opt"])
def test_a_step_reads_every_weight_once(name: str, dtype: torch.dtype) -> None:
    model = hfopt.optimize(models()[name].eval().to(dtype))
    program = hfopt.explain(model).program
    assert program is not None
    read = sum(weight.nbytes for weight in roofline.read_weights(model))
    assert sum(line.n_bytes for line in program.instructions) == read
    looked_up = {line.name: line.row_bytes for line in program.instructions if line.row_bytes}
    assert looked_up.keys() <= {"embedding", "add embedding"} and program.n_bytes > read
    assert program.cached_bytes == roofline.bytes_per_token_in_cache(model)
    assert sum(line.writes is None for line in program.instructions) == 1


def test_slots_lie_in_the_scratch() -> None:
    model = hfopt.optimize(models()["gptj"].eval())
    with torch.inference_mode():
        made = programs_of(model).of(model, 1)
    assert made.listing == hfopt.explain(model).program
    places = {place for line in made.listing.instructions for place in (*line.reads, line.writes or 0)}
    assert max(places) < made.listing.scratch_bytes <= made.steps(1)._arena.nbytes


def test_the_report_has_a_program_or_a_reason() -> None:
    model = models()["llama"].eval()
    before = hfopt.explain(model)
    assert before.by_module is None and before.program is not None
    hfopt.optimize(model)
    assert hfopt.explain(model).program == before.program == model.__dict__["hfopt"].program
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *args: None)
    report = hfopt.explain(model)
    assert (
        report.program is None and report.by_module == "model.layers.1.mlp is in training mode or has hooks"
    )
    handle.remove()
    assert hfopt.explain(model).program == before.program
