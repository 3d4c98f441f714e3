"""`python -m instructgpt_hf.cli`: the command where it is not on the path."""

import sys

from instructgpt_hf.cli import main

sys.exit(main())
