"""transformers' own tests of models, with and without every model optimized: does hfopt make one of them worse?

The tests that every model has to pass come with the source package of a release, which has to be the installed one:

    pip install parameterized
    pip download --no-deps --no-binary :all: transformers==5.24.0 && tar xzf transformers-5.24.0.tar.gz
    python scripts/upstream.py transformers-5.24.0

Exit code 1 if a test fails with hfopt that passes without. (The package has `tests/test_modeling_common.py`, not the tests
of single families and of `generate`.)
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

_OPTIMIZES = "HFOPT_OPTIMIZES"


def pytest_configure(config: Any) -> None:
    """As a plugin of pytest: let every model that is put into evaluation mode be optimized."""
    if os.environ.get(_OPTIMIZES) != "1":
        return
    from transformers import GenerationMixin, PreTrainedModel

    import hfopt

    evaluate = PreTrainedModel.eval

    def eval(self: Any) -> Any:
        evaluate(self)
        if isinstance(self, GenerationMixin) and "hfopt" not in vars(self):
            model: Any = self
            with contextlib.suppress(
                hfopt.UnsupportedDevice
            ):  # some tests begin without memory for the weights
                hfopt.optimize(model)
        return self

    PreTrainedModel.eval = eval  # type: ignore[method-assign]


# What `ModelTesterMixin` of the package asks of a family: its class, a small configuration, inputs.
_TESTS = """
import unittest
import torch, transformers
from tests.test_modeling_common import ModelTesterMixin

class Tester:
    is_training = False
    batch_size, seq_length, num_hidden_layers, num_attention_heads, hidden_size = 3, 7, 2, 4, 32

    def __init__(self, parent, family, sizes):
        self.parent, self.family, self.sizes = parent, family, sizes

    def get_config(self):
        return getattr(transformers, self.family + "Config")(
            vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2, **self.sizes
        )

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, 99, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

class Family(ModelTesterMixin):
    test_resize_embeddings = test_head_masking = test_pruning = False
    def setUp(self):
        self.model_tester = Tester(self, self.family, self.sizes)

class LlamaTest(Family, unittest.TestCase):
    family = "Llama"
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    all_model_classes = (transformers.LlamaForCausalLM,)

class GPTJTest(Family, unittest.TestCase):
    family = "GPTJ"
    sizes = dict(n_embd=32, n_inner=64, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
    all_model_classes = (transformers.GPTJForCausalLM,)

class OPTTest(Family, unittest.TestCase):
    family = "OPT"
    sizes = dict(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)
    all_model_classes = (transformers.OPTForCausalLM,)
"""


# what it imports of tests that are not in the package
_MISSING = {
    "generation/test_utils.py": "GenerationTesterMixin",
    "exporters/test_export.py": "ExportTesterMixin",
}


def outcomes(package: Path, options: list[str], *, is_optimized: bool) -> dict[str, str]:
    """What became of each test: its name, and passed, failed or skipped."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{Path(__file__).parent}", "CUDA_VISIBLE_DEVICES": ""}
    environment[_OPTIMIZES] = "1" if is_optimized else "0"
    with tempfile.TemporaryDirectory() as folder:
        # a copy, which may be written into
        tests, report = Path(folder) / "tests", Path(folder) / "report.xml"
        shutil.copytree(package / "tests", tests)
        (tests / "__init__.py").touch()
        (tests / "test_families.py").write_text(_TESTS)
        for module, mixin in _MISSING.items():
            (tests / module).parent.mkdir(exist_ok=True)
            (tests / module).with_name("__init__.py").touch()
            (tests / module).write_text(f"class {mixin}: pass\n")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "upstream", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", "tests/test_families.py", *options]
        subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=False)
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case}
            name = f"{case.get('classname')}.{case.get('name')}"
            found[name] = (
                "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            )
        return found


def main() -> int:
    """Run both, print a line for each family and each test that is worse; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", type=Path, help="the unpacked source package")
    parser.add_argument("-k", metavar="EXPRESSION", help="only tests that match, as in pytest")
    args = parser.parse_args()
    options = [] if args.k is None else ["-k", args.k]
    stock, ours = (outcomes(args.package, options, is_optimized=each) for each in (False, True))
    for who, found in (("stock", stock), ("hfopt", ours)):
        print(f"{who}: {dict(sorted(Counter(found.values()).items()))}")
    worse = [name for name, outcome in stock.items() if outcome == "passed" and ours.get(name) != "passed"]
    for name in worse:
        print(f"worse: {name}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
