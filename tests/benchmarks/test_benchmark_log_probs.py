"""The benchmark of log-probabilities measures what is equal, and draws it."""

import json

import log_probs
import pytest
from common.memory import BenchmarkError

SMALL = ["--tokens", "6", "--width", "8", "--vocabulary", "50", "--rounds", "2"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measures_and_draws(tmp_path, capsys, dtype):
    path = tmp_path / "found.json"
    log_probs.main([*SMALL, "--dtype", dtype, "--output", str(path)])
    (run,) = json.loads(path.read_text())["runs"]
    assert run["forward"]["differences"].keys() == {"log-probs"}
    assert run["backward"]["differences"].keys() == {"log-probs", "hidden", "weight"}
    log_probs.main(["--output", str(path), "--draw"])
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert f"| {dtype}, 6 | with gradient |" in capsys.readouterr().out


def test_nothing_is_timed_if_the_numbers_differ(tmp_path, monkeypatch):
    ours = log_probs._ours
    monkeypatch.setattr(log_probs, "_ours", lambda *inputs: 1.01 * ours(*inputs))
    monkeypatch.setattr(log_probs, "interleave", lambda *_: pytest.fail("timed"))
    with pytest.raises(BenchmarkError, match="do not compute the same thing"):
        log_probs.main([*SMALL, "--output", str(tmp_path / "found.json")])
