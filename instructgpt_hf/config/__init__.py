"""Settings: TRL's config dataclasses with the paper's defaults, and recipes, the YAML files that fill them."""

from instructgpt_hf._compat.quirks import silence_kernel_hint

silence_kernel_hint()
