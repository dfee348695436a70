"""What a user does first with the installed package: `make package` runs it, with nothing else around it."""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfopt

packages = Path(sysconfig.get_path("purelib")).resolve()
assert packages in Path(hfopt.__file__).resolve().parents, f"{hfopt.__file__} is not the installed package"
for tool in ("git", "make", "gcc", "cc"):
    assert shutil.which(tool) is None, f"{tool} is there: the environment is not bare"
print("Python", sys.version.split()[0], "torch", torch.__version__, "transformers", transformers.__version__)

folder = hfopt.embedded_model()
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Read up to", return_tensors="pt")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
for options in ({}, {"num_beams": 4}):
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=24, **options)
    hfopt.optimize(model, strict=True)
    given = model.generate(**inputs, do_sample=False, max_new_tokens=24, **options)
    hfopt.restore(model)
    assert torch.equal(given, expected), (given, expected)
print(tokenizer.decode(given[0]))

command = [str(Path(sysconfig.get_path("scripts")) / "hfopt"), "explain", folder]
done = subprocess.run(command, capture_output=True, text=True, check=False)
if importlib.util.find_spec("rich"):  # an extra, which something else may have brought along
    assert done.returncode == 0 and "a decode step is one call" in done.stdout, done
else:
    assert done.returncode == 2 and 'pip install "hfopt[cli]"' in done.stderr, done
