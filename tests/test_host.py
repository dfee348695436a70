"""What the installed transformers calls things, and what a role is: read off classes, in one place."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from packaging.requirements import Requirement
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, LlamaForCausalLM, OPTForCausalLM

import hfopt
from hfopt import host
from hfopt.host import release
from tests.generation_cases import llama, prompts

ROOT = Path(__file__).parents[1]
# names that releases of transformers have, or had, for the cache
NAMES = re.compile(r"\b(past_key_values?|layer_past|cache_params|past_buckets_states)\b")
OWN = re.compile(r"\blayer_past\b")  # an argument of ipex.llm's attention, whose blocks have it too
BLOCKS = {
    "hfopt/functional/beam_past.py",
    "hfopt/functional/indirect.py",
    "hfopt/modules/indirect.py",
    "tests/test_indirect.py",
}


def test_no_other_file_spells_the_names_of_the_cache() -> None:
    here = Path(__file__)
    sources = [path for part in ("hfopt", "scripts", "tests") for path in sorted((ROOT / part).rglob("*.py"))]
    spelled = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources
        if path != here and ROOT / "hfopt" / "host" not in path.parents
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if NAMES.search(OWN.sub("", line) if f"{path.relative_to(ROOT)}" in BLOCKS else line)
    ]
    assert len(sources) > 100 and not spelled


def test_the_rule_sees_names(tmp_path: Path) -> None:
    assert NAMES.search("model(past_key_" + "values=cache)") and NAMES.search("self.layer_past")


# ---- releases ----------------------------------------------------------------------------------------------


def test_an_old_release_is_named_by_the_import() -> None:
    code = (
        "from importlib import metadata\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: '4.57.5' if name == 'transformers' else real(name)\n"
        "import hfopt\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 1
    assert "ImportError: hfopt needs transformers 4.57.6 or newer, and 4.57.5 is installed" in finished.stderr


@pytest.mark.parametrize(("installed", "is_old"), [("4.57.6", False), ("5.24.0", False), ("4.9.0", True)])
def test_releases_are_compared_as_versions(
    monkeypatch: pytest.MonkeyPatch, installed: str, is_old: bool
) -> None:
    monkeypatch.setattr(release, "installed", lambda: installed)
    if is_old:
        with pytest.raises(ImportError, match="pip install --upgrade transformers"):
            release.check_release()
    else:
        release.check_release()


def test_the_package_asks_for_the_same_releases() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (needed,) = (each for each in map(Requirement, project["dependencies"]) if each.name == "transformers")
    assert str(needed.specifier) == f">={host.OLDEST}"


# ---- names of the cache ------------------------------------------------------------------------------------


def test_the_cache_of_this_release() -> None:
    for kind in (LlamaForCausalLM, OPTForCausalLM):
        assert host.cache_argument(kind.forward) == host.REQUEST_CACHE
    assert host.REQUEST_CACHE in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    cache = DynamicCache()
    output = host.causal_output(torch.zeros(1, 1, 3), cache)
    assert output.logits.shape == (1, 1, 3) and host.cache_in(output.values()) is cache


def annotated(self: Any, states: Tensor, kept: Cache | None = None, use_cache: bool = False) -> None: ...
def quoted(self: Any, states: Tensor, kept: "Cache | None" = None) -> None: ...
def named(self: Any, states, layer_past=None) -> None: ...
def unnamed(self: Any, states, memory=None) -> None: ...
def double(self: Any, states, one: Cache | None = None, other: Cache | None = None) -> None: ...


@pytest.mark.parametrize(
    ("forward", "name"),
    [(annotated, "kept"), (quoted, "kept"), (named, "layer_past"), (unnamed, None), (double, None)],
)
def test_the_cache_among_arguments(forward: Any, name: str | None) -> None:
    assert host.cache_argument(forward) == name


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed:FutureWarning")
@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_a_user_may_go_on_with_an_old_name_where_transformers_takes_it(name: str) -> None:
    ids = prompts(1)["input_ids"]
    outcomes: list[Any] = []
    for model in (llama(), hfopt.optimize(llama())):
        for num_beams in (1, 3):
            given: dict[str, Any] = {name: DynamicCache()}
            try:
                outcomes.append(
                    model.generate(ids, max_new_tokens=5, do_sample=False, num_beams=num_beams, **given)
                )
            except ValueError as error:
                outcomes.append(str(error))
        cache = DynamicCache()
        with torch.no_grad():
            output = model(ids, use_cache=True, **{name: cache})
        outcomes.append((cache.get_seq_length(), host.cache_in(output.values()) is cache))
    for theirs, ours in zip(outcomes[:3], outcomes[3:], strict=True):
        assert torch.equal(theirs, ours) if isinstance(theirs, Tensor) else theirs == ours
    if name == host.REQUEST_CACHE:
        assert isinstance(outcomes[0], Tensor) and outcomes[2] == (9, True)


# ---- roles -------------------------------------------------------------------------------------------------


def layer(
    self: Any,
    x: Tensor,
    kept: Cache | None = None,
    attention_mask: Tensor | None = None,
    window: int = 7,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> None: ...


X, MASK, ANGLES = torch.zeros(1), torch.ones(1), (torch.ones(1), torch.ones(1))


@pytest.mark.parametrize(
    ("args", "kwargs", "roles"),
    [
        ((X,), {}, {"hidden_states": X}),
        ((X, "c", MASK), {}, {"hidden_states": X, "cache": "c", "attention_mask": MASK}),
        ((), {"position_embeddings": ANGLES, "kept": "c", "x": X}, {"position_embeddings": ANGLES, "cache": "c"}),
        ((X, None, None, 7), {}, {"hidden_states": X}),
        ((X, None, None, 8), {}, None),
        ((X,), {"new": None, "output_hidden_states": True}, {"hidden_states": X}),
        ((X,), {"new": False}, None),
        ((X,), {"is_causal": True, "output_attentions": False}, {"hidden_states": X}),
        ((X,), {"is_causal": False}, None),
        ((X,), {"output_attentions": True}, None),
        # under a name that the host no longer has, and under two names
        ((X,), {"layer_past": "c"}, {"cache": "c"}),
        ((X, "c"), {"layer_past": "d"}, None),
        ((X, None), {"layer_past": "d"}, {"cache": "d"}),
        ((X,) * 9, {}, None),
    ],
)  # fmt: skip
def test_values_by_role(args: tuple[Any, ...], kwargs: dict[str, Any], roles: dict[str, Any] | None) -> None:
    found = host.Arguments.of(layer).read(args, kwargs)
    if roles is None:
        assert found is None
    else:
        assert found is not None
        given = {role: value for role, value in found.items() if value is not None}
        assert {"hidden_states": X, **roles} == given


def test_values_by_name() -> None:
    arguments = host.Arguments.of(layer)
    named = arguments.named(hidden_states=X, cache="c", position_ids="p")
    assert named == {"x": X, "kept": "c"} and not arguments.needed


def test_roles_that_a_replacement_does_not_take_are_unknown() -> None:
    arguments = host.Arguments.of(layer, frozenset({"hidden_states"}))
    assert arguments.read((X, None), {"use_cache": None}) == {"hidden_states": X}
    assert arguments.read((X, "c"), {}) is None and arguments.read((X,), {"use_cache": True}) is None


def test_arguments_of_unknown_role_that_are_needed() -> None:
    def forward(self: nn.Module, x: Tensor, window: int, cache: Any = None) -> None: ...

    assert host.Arguments.of(forward).needed == ("window",)


# ---- the code of loops -------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = host.fingerprint()
    assert before == host.fingerprint()

    def _sample(self: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        return input_ids + 1

    methods = host.methods()
    monkeypatch.setattr(GenerationMixin, "_sample", _sample)
    assert host.fingerprint() != before and host.methods() != methods
    monkeypatch.undo()
    assert host.fingerprint() == before and host.methods() == methods


def test_arguments_of_generate_by_name() -> None:
    model = object()
    given = host.generate_arguments(model, (X, None), {"num_beams": 2, "streamer": "s"})
    assert given == {"inputs": X, "generation_config": None, "num_beams": 2, "streamer": "s"}
    with pytest.raises(TypeError, match="multiple values"):
        host.generate_arguments(model, (X,), {"inputs": X})
