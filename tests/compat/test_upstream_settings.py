"""The settings that the help texts show are those of the imported classes, and need neither torch nor TRL."""

import json
import subprocess
import sys

import pytest

from instructgpt_hf.config.settings import stage_settings

CODE = """
import json, sys
from instructgpt_hf._compat.upstream_settings import importable_quickly
before = set(sys.modules)
with importable_quickly() as settings:
    stages = ("sft", "reward", "ppo")
    shown = {stage: [list(map(str, (item.name, item.default, item.help, item.source)))
             for item in settings.stage_settings(stage).values()] for stage in stages}
assert not {"torch", "trl", "transformers"} & set(sys.modules)
assert not [name for name in sys.modules if name.startswith("instructgpt_hf.config.") and "stand" in name]
from instructgpt_hf.config.training import SFTConfig
import trl
assert issubclass(SFTConfig, trl.SFTConfig) and len(trl.SFTConfig.__mro__) > 3
print(json.dumps(shown))
"""


@pytest.fixture(scope="module")
def quick():
    done = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_names_defaults_and_help_are_upstreams(quick, stage):
    known = stage_settings(stage).values()
    assert quick[stage] == [list(map(str, (item.name, item.default, item.help, item.source))) for item in known]
    assert all(item.help for item in known)
