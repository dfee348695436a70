"""`hfopt accuracy` without installing the package; `--help` lists the flags."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hfopt.cli import main

sys.exit(main(["accuracy", *sys.argv[1:]]))
