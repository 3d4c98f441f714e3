"""What the user sees: results and log lines apart, life at all times, values as they are, every terminal."""

import io
import re
import time

import pytest
from rich.console import Console

from instructgpt_hf.models.inputs import map_by_length, watch_batches
from instructgpt_hf.stages import output as module
from instructgpt_hf.stages.output import LOG_FILE, Output, Phase


@pytest.fixture
def quick(monkeypatch):
    """Lines every 20 milliseconds instead of seconds."""
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.02)
    monkeypatch.setattr(module, "SHORT_PHASE", 0)


def log_of(folder):
    """The lines of a log file without their times."""
    lines = (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines)
    return [line[21:] for line in lines]


def test_results_and_progress_go_to_different_places(capsys, tmp_path):
    with Output() as output:
        output.open_log(tmp_path)
        output.log("read as pairs", "reward")
        output.result("held-back accuracy 0.6", "reward")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("  reward  held-back accuracy 0.6\n", "  reward  read as pairs\n")
    assert log_of(tmp_path) == ["  reward  read as pairs", "  reward  held-back accuracy 0.6"]


def test_quiet_prints_results_only_and_logs_everything(capsys, tmp_path):
    from tqdm import tqdm

    with Output(quiet=True) as output:
        output.open_log(tmp_path)
        output.log("read as pairs")
        with output.phase(Phase("training")):
            list(tqdm(range(3)))
        output.result("done")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("done\n", "")
    assert log_of(tmp_path) == ["read as pairs", "training", "done"]
    assert list(tqdm(range(3), file=io.StringIO())) == [0, 1, 2] and not tqdm(file=io.StringIO()).disable


def test_a_log_begins_with_its_folder_and_is_appended_to(tmp_path):
    folder = tmp_path / "run"
    with Output(quiet=True) as output:
        output.open_log(folder)
        output.log("before")
        assert not folder.exists()
        folder.mkdir()
        output.log("after")
    with Output(quiet=True) as output:
        output.open_log(folder)
        output.log("again")
    assert log_of(folder) == ["before", "after", "again"]


def test_a_log_that_waits_leaves_nothing_of_a_run_that_is_refused_at_once(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    for seconds in (29, 31):
        with pytest.raises(ValueError), Output(quiet=True) as output:
            output.open_log(tmp_path, after=30)
            output.log("checking data")
            now += seconds
            raise ValueError("no such file")
        assert (tmp_path / LOG_FILE).exists() == (seconds > 30)
    assert log_of(tmp_path) == ["checking data", "ended: no such file"]


def test_an_error_ends_the_log(tmp_path):
    with pytest.raises(ValueError), Output(quiet=True) as output:
        output.open_log(tmp_path)
        with output.phase(Phase("loading models")):
            raise ValueError("no such model")
    assert log_of(tmp_path) == ["loading models", "ended: no such model"]


def test_one_long_step_shows_life(quick, tmp_path):
    """Nothing calls the phase meanwhile, as in a step of many minutes."""
    with Output(quiet=True) as output:
        output.open_log(tmp_path)
        with output.phase(Phase("training", 3, "steps", "sft")):
            time.sleep(0.2)
    assert log_of(tmp_path).count("     sft  training: 0 of 3 steps, 0:00 elapsed") >= 2


def test_log_lines_carry_elapsed_time_and_time_left(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    phase = Phase("training", unit="steps")
    now += 10
    phase.begin(50, 150)  # resumed at step 50; loading is not counted into the rate
    now += 300
    phase.at(60)
    phase.latest = "loss 1.250"
    assert phase.long() == "training: 60 of 150 steps, 30.0 s each, 5:10 elapsed, 45:00 left: loss 1.250"
    assert phase.short() == "60/150 30.0 s each 5:10<45:00"
    phase.part = "sampling 32/64"
    assert phase.long().endswith("45:00 left, sampling 32/64: loss 1.250") and phase.short().endswith(
        " sampling 32/64"
    )
    now += 7200
    phase.at(150)
    assert phase.end() == "training: 150 steps in 2:05:10: loss 1.250"


def test_a_second_pass_is_counted_anew(monkeypatch):
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    phase = Phase("KL", unit="rows")
    phase.at(0, 100)
    now = 100
    phase.at(100)
    phase.at(0)
    now = 101
    phase.at(10)
    assert phase.long() == "KL: 10 of 100 rows, 10.0/s, 1:41 elapsed, 0:09 left"


def test_batches_of_rows_are_watched():
    seen = []
    with watch_batches(lambda done, total: seen.append((done, total))):
        map_by_length(lambda rows: rows, [[1]] * 5, 2)
    map_by_length(lambda rows: rows, [[1]] * 5, 2)
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_bars_and_no_lines_for_them(quick):
    console = Console(file=Terminal(), force_terminal=True, width=80, color_system=None)
    with Output(console) as output, output.phase(Phase("training", 4, "steps", "sft")) as phase:
        phase.at(1)
        phase.latest = "loss 1.250 [x=1]"
        with output.phase(Phase("measuring held-back rows", 7, "batches", "sft")) as inner:
            inner.at(3)
            time.sleep(0.3)
    text = console.file.getvalue()
    assert "1/4" in text and "3/7" in text and "[x=1]" in text and "elapsed" not in text
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", ["a[x=1]", "[bold]b[/bold]", "[/red]", ":smile:"])
def test_values_are_printed_as_they_are(name, capsys, tmp_path):
    with Output() as output:
        output.open_log(tmp_path)
        output.log(f"read {name}", "sft")
        output.result(f"wrote {name}")
        with output.phase(Phase(f"merging {name}")):
            pass
    shown = capsys.readouterr()
    assert shown.out == f"wrote {name}\n" and shown.err == f"     sft  read {name}\nmerging {name}\n"
    assert log_of(tmp_path) == [f"     sft  read {name}", f"wrote {name}", f"merging {name}"]
