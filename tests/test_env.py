"""env and limits: what they read from the system, and what they count of a model."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from hfopt.bench import roofline
from hfopt.machine import env, linux
from tests import fresh
from tests.decoders import made
from tests.generation_cases import cache_of

CPU_PATH = "from hfopt.machine import env; print(env.cpu_path())"


@pytest.mark.parametrize(
    ("cpu", "features", "path"),
    [
        ("generic", "", "portable"),
        ("x86-64", "+avx2,+fma,-avx512f", "AVX2"),
        ("x86-64", "+avx2,+fma,+avx512f", "AVX-512"),
        ("x86-64", "+avx2,+fma,+avx512f,+avx512bf16", "AVX-512 BF16"),
    ],
)
def test_cpu_path_follows_the_compilation_target(cpu: str, features: str, path: str) -> None:
    assert fresh.run(CPU_PATH, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features).strip() == path


def test_features_of_the_host_agree_with_the_kernel_of_the_system() -> None:
    if "NUMBA_CPU_NAME" in os.environ or "NUMBA_CPU_FEATURES" in os.environ:
        pytest.skip("the target is not the host")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "flags" not in flags:
        pytest.skip("no x86 flags to compare with")
    for flag, feature in (("avx2", "avx2"), ("fma", "fma"), ("avx512_bf16", "avx512bf16")):
        assert (f" {flag} " in flags) == (feature in env.features())


@pytest.fixture(scope="module")
def restricted() -> dict[str, Any]:
    """What env says in a new process without a cache folder, that ran no kernel."""
    code = (
        "import json; from hfopt.machine import env; "
        "print(json.dumps([env.cache_folder(), env.threading_layer()]))"
    )
    keys = ("cache folder", "layer")
    return dict(zip(keys, json.loads(fresh.run(code, HFOPT_CACHE_DIR="off")), strict=True))


def test_cache_folder_says_why_there_is_none(restricted: dict[str, Any]) -> None:
    folder, state = restricted["cache folder"]
    assert folder is None
    assert "HFOPT_CACHE_DIR" in state


def test_threading_layer_is_torchs_before_any_kernel_ran(restricted: dict[str, Any]) -> None:
    assert restricted["layer"] == "torch's OpenMP"


def test_busy_cores_are_those_of_this_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two cores that this process may run on, one and a half are busy; what a third one does counts for nothing."""
    monkeypatch.setattr(linux, "PROC", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2}, raising=False)
    (tmp_path / "stat").write_text(
        "cpu 9 9 9 9 9 9 9 9 9 9\ncpu0 100 0 0 50 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0\ncpu2 7 0 0 9 0 0 0 0 0 0\nctxt 12\n"
    )

    def pass_time(seconds: float) -> None:
        (tmp_path / "stat").write_text(
            "cpu 9 9 9 9 9 9 9 9 9 9\n"
            "cpu0 120 5 5 50 0 10 0 10 0 0\ncpu1 50 0 0 0 0 0 0 0 0 0\ncpu2 32 0 0 19 15 0 0 0 0 0\nctxt 12\n"
        )

    monkeypatch.setattr(env.time, "sleep", pass_time)
    assert env.busy_cores() == 1.5
    monkeypatch.setattr(linux, "PROC", tmp_path / "none")
    assert env.busy_cores() == 0


def test_the_largest_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "CACHES", tmp_path)
    assert env.last_level_cache() == 0
    for index, size in enumerate(("48K", "2048K", "1024K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert env.last_level_cache() == 2048 << 10


def test_openmp_copies_name_the_one_that_torch_brought() -> None:
    torch.ones(1000).sum()
    copies = env.openmp_copies()
    assert copies == sorted(set(copies))
    if sys.platform == "linux":
        assert any("omp" in Path(copy).name for copy in copies)


def test_peak_memory_is_measured_anew_after_a_reset() -> None:
    if env.resident_memory() == 0:
        pytest.skip("the system does not tell")
    block = np.ones(64 << 20, dtype=np.uint8)
    with_block = env.peak_memory()
    assert with_block >= env.resident_memory() >= block.nbytes
    del block
    env.reset_peak_memory()
    if env.peak_memory() == with_block:
        pytest.skip("the system does not allow a reset")
    assert env.peak_memory() < with_block - (32 << 20)


def test_versions_name_what_results_depend_on() -> None:
    versions = env.versions()
    assert versions["torch"] == torch.__version__
    assert set(versions) >= {"python", "transformers", "numba", "llvmlite"}


def llama(tied: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101,
            hidden_size=48,
            intermediate_size=72,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_an_embedding_only_as_the_lm_head(tied: bool) -> None:
    model = llama(tied)
    layer = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 72 + 2 * 48
    weights = 4 * (3 * layer + 48 + 101 * 48)
    assert sum(weight.nbytes for weight in roofline.read_weights(model)) == weights
    token = 4 * 2 * 3 * 2 * 12  # float32, keys and values, layers, heads, channels
    assert roofline.bytes_per_token_in_cache(model) == token
    assert roofline.bytes_per_step(model, 2, 10, 8, 6) == weights + token * (2 * 10 + 8 * 3)


def test_position_tables_are_not_read() -> None:
    config = OPTConfig(
        vocab_size=50,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1000,
        word_embed_proj_dim=16,
    )
    read = roofline.read_weights(OPTForCausalLM(config))
    assert max(weight.shape[0] for weight in read) == 50


def test_prefill_operations_are_two_a_weight_and_token() -> None:
    model = llama(tied=True)
    layer = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 72
    attention = 3 * 2 * 2 * 48 * 10 * 10 / 2
    assert roofline.prefill_operations(model, 2, 10) == 2 * (2 * 3 * layer * 10 + attention + 2 * 101 * 48)


def test_bandwidth_is_the_size_of_the_buffer_over_the_time_of_a_pass() -> None:
    meter = roofline.BandwidthMeter()
    begin = time.perf_counter()
    rate = meter.measure(passes=2)
    seconds = time.perf_counter() - begin
    # three passes went by, the fastest of which counts
    assert rate >= 2 * roofline._MIN_BUFFER / seconds
    assert rate < 1e13


@pytest.mark.parametrize(
    "name", ["llama", "falcon-7b", "falcon-40b", "falcon, sequential", "gpt-bigcode", "gpt2"]
)
def test_heads_of_keys_are_those_that_are_cached(name: str) -> None:
    model = made(name)
    result = model.generate(torch.tensor([[3, 2]]), max_new_tokens=2, return_dict_in_generate=True)
    assert cache_of(result).layers[0].keys.shape[1] == roofline.attention_shape(model)[2]
