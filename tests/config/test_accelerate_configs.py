"""The launcher files that ship: accelerate reads them, and their first lines say what is known of them."""

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from instructgpt_hf.config.catalog import list_recipes, recipes_root

FOLDER = recipes_root() / "accelerate_configs"
FILES = sorted(FOLDER.glob("*.yaml"))
TYPES = {
    "ddp": "MULTI_GPU",
    "deepspeed_zero2": "DEEPSPEED",
    "deepspeed_zero3": "DEEPSPEED",
    "fsdp2": "FSDP",
    "single_gpu": "NO",
}


def test_files():
    assert [path.stem for path in FILES] == sorted(TYPES)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"[{path.name}]({path.name})" in readme for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_it(path):
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert str(config.distributed_type).endswith(TYPES[path.stem])
    assert config.mixed_precision == "no", "the recipe decides"
    assert config.num_processes == (1 if path.stem == "single_gpu" else 2)
    stage = config.deepspeed_config.get("zero_stage")
    assert stage == {"deepspeed_zero2": 2, "deepspeed_zero3": 3}.get(path.stem)
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) <= set(vars(config)), "no key that accelerate drops"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_header_says_whether_it_is_tested_and_its_limits(path):
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    assert any(line.startswith(("# Tested: ", "# Not tested: ")) for line in header)
    assert any(line.startswith("# Limits: ") for line in header)


def test_it_is_no_recipe():
    assert "accelerate_configs" not in [name for name, _, _ in list_recipes()]
