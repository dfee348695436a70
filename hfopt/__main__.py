"""`python -m hfopt`: the command line, as torchrun starts it."""

import sys

from hfopt.cli import main

sys.exit(main())
