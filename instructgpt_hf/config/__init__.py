"""Settings: TRL's config dataclasses with the paper's defaults, and recipes, the YAML files that fill them."""

import logging

# Importing TRL imports bitsandbytes, which on some CPUs complains that an optional kernel package is missing. It works
# without, and installing that package would only make it look for a download.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit" not in record.getMessage())
