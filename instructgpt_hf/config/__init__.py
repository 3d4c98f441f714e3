"""Settings: dataclasses that say what differs from TRL's, and recipes, the YAML files that fill them."""

from instructgpt_hf._compat.quirks import silence_kernel_hint

silence_kernel_hint()
