"""What the benchmark scripts share. `memory` and `training` also run in the peer's environment."""

import os

# Set before any library is imported: nothing is downloaded, and no progress bar is timed.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
