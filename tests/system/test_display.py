import io
import random

import pytest
from espalier.trainer.display import Display, clock, plain_line, sparkline
from rich.console import Console


def shown(rows, terminal, steps=60, width=100):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, height=40)
    with Display("a run", steps, console) as display:
        for row in rows:
            display.on_event(row)
        panel = io.StringIO()
        Console(file=panel, width=width).print(display._draw())
    return out.getvalue(), panel.getvalue()


def test_a_terminal_sees_a_panel_with_what_matters(rows):
    out, panel = shown(rows, terminal=True)
    for word in ("2 of 60", "0.340 at the start", "now 0.830", "4,500 tokens/s", "ungraded 3", "env 1", "left"):
        assert word in panel, word
    assert "\x1b[" in out


def test_both_say_which_tasks_are_left_out(rows):
    row = {"kind": "tasks", "train": 1200, "held_out": 40, "dropped": {"a7": "no answer"}, "noted": {}}
    for terminal in (True, False):
        out, panel = shown([row, *rows], terminal)
        said = panel if terminal else out
        assert "1,200 tasks to train on, 40 held out; 1 left out, the first: a7: no answer" in " ".join(
            said.replace("│", " ").split()
        )


def test_elsewhere_there_are_plain_lines_one_an_event(rows):
    out, _ = shown(rows, terminal=False)
    assert "\x1b" not in out
    lines = out.strip().splitlines()
    assert len(lines) == len(rows)
    assert lines[1] == "pass@1 sampled 0.340 [0.290, 0.390] on 400 tasks, version 0"
    assert lines[3].startswith("step 1/60  reward 0.310") and lines[3].endswith("failures 2")


def test_time_left_follows_the_median_of_recent_steps(train_row):
    with Display("x", 10, Console(file=io.StringIO())) as display:
        assert display.seconds_left() is None
        for step in (1, 2, 3, 4):
            display.on_event(train_row(step))
        assert display.seconds_left() == pytest.approx(6 * 5.0)


def test_what_comes_from_outside_is_not_read_as_markup(train_row):
    rows = [train_row(1, failures={"[bold]x[/bold]": 1}), {"kind": "alarm", "message": "[/nonsense] stop"}]
    out, panel = shown(rows, terminal=False)
    assert "[/nonsense] stop" in out and "[bold]x[/bold]" in panel


def test_rows_with_missing_or_odd_fields_never_stop_a_run(train_row):
    draw = random.Random(0)
    for _ in range(200):
        row = {key: draw.choice([value, None]) for key, value in train_row(1).items()}
        row["kind"] = draw.choice(["train", "eval", "phase", "alarm", "tasks", "else"])
        row.pop(draw.choice(sorted(set(row) - {"kind"})))
        shown([row], terminal=False)


def test_small_parts():
    assert clock(59.9) == "0:59" and clock(3661) == "1:01:01"
    assert sparkline([0.0, 0.5, 1.0], 10) == "▁▅█" and len(sparkline([0.1] * 100, 40)) == 40
    assert plain_line({"kind": "else"}, 3) == ""
