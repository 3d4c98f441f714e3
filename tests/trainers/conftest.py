"""What the scripts of this folder, which run in processes of their own, read."""

import pytest
import torch


@pytest.fixture
def ppo_source(make_policy, make_scorer, tokenizer, tmp_path):
    """A folder with `policy`, `scorer` and `tokenizer`."""
    policy = make_policy()
    with torch.no_grad():
        policy.lm_head.weight[1] *= 4  # answers that end, after one token or several
    policy.save_pretrained(tmp_path / "policy")
    make_scorer().save_pretrained(tmp_path / "scorer")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path
