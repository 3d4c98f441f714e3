"""`python -m instructgpt_hf.cli`, for where the command is not on the path."""

import sys

from instructgpt_hf.cli import main

sys.exit(main())
