"""`python -m lightning_prune.cli`: the command where its script is not on the path."""

import sys

from lightning_prune.cli import main

sys.exit(main())
