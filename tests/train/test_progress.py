"""A bar in a terminal, lines in a log, and next to nothing when quiet; and the loss curve."""

import builtins
import sys

import pytest

from minilora.train import plot, progress
from minilora.train.plot import plot_losses, running_mean
from minilora.train.progress import Bar, Lines, Quiet, StepReport, choose, clock
from tests.train import made


def report(step, valid_loss=None):
    return StepReport(step, 1.23456, 2345.6, 1_500_000_000, valid_loss)


def test_a_log_gets_about_twenty_whole_lines_with_the_time_left(capsys, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))  # a second a step
    lines = Lines()
    lines.start(0, 200)
    for step in range(1, 201):
        lines.step(report(step, 2.5))
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 21
    assert shown[0].startswith("step 1/200  loss 1.2346  valid 2.5000  2,346 tok/s  1.5 GB  ")
    assert shown[10].endswith("1:40 left")
    assert shown[-1].startswith("step 200/200")
    assert shown[-1].endswith("0:00 left")


def test_a_slow_run_says_something_every_minute_and_a_resumed_one_counts_its_own_steps(capsys, monkeypatch):
    now = iter(range(0, 100_000, 61))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    lines = Lines()
    lines.start(50, 100)
    for step in range(51, 54):
        lines.step(report(step))
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in shown] == ["51/100", "52/100", "53/100"]
    assert shown[-1].endswith(f"{clock(61 * 47)} left")


def test_quiet_shows_warnings_only_and_on_stderr(capsys):
    quiet = choose(quiet=True)
    assert type(quiet) is Quiet
    quiet.line("text")
    quiet.start(0, 2)
    quiet.step(report(1))
    quiet.warn("careful")
    quiet.close()
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "warning: careful\n")


def test_outside_a_terminal_there_are_lines(capsys):
    assert type(choose(quiet=False)) is Lines


def test_a_terminal_without_rich_gets_lines_and_is_told_once(capsys, monkeypatch):
    plain_import = builtins.__import__

    def without_rich(name, *arguments, **options):
        if name.startswith("rich"):
            raise ImportError(name)
        return plain_import(name, *arguments, **options)

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(builtins, "__import__", without_rich)
    assert type(choose(quiet=False)) is Lines
    assert "rich is not installed" in capsys.readouterr().out


def test_what_stays_is_printed_while_the_bar_runs_and_after_it(capsys):
    bar = Bar()
    bar.line("before [q]")
    bar.start(0, 3)
    bar.step(report(1))
    bar.line("during [q]")
    bar.warn("careful")
    bar.close()
    bar.close()
    bar.line("after")
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("before [q]", "during [q]", "warning: careful", "after", "1/3"))


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3723, "1:02:03")])
def test_a_clock_shows_hours_when_there_are_any(seconds, text):
    assert clock(seconds) == text


# --- the loss curve


def test_the_curve_is_a_png_of_every_loss_and_the_validation(tmp_path):
    records = [{"step": 0, "validation_loss": 4.0}, *({"step": n, "loss": 4 / n} for n in range(1, 101))]
    plot_losses(records, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_the_running_mean_takes_a_window_that_ends_at_each_value():
    assert running_mean([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
    assert running_mean([1, 2, 3], 5) == [1, 1.5, 2]


def test_a_run_draws_its_curve_and_without_matplotlib_says_so_in_a_line(tmp_path, monkeypatch, capsys):
    result = made.train(made.model(), out=tmp_path / "with", call={"quiet": False})
    assert result.paths["curve"] == tmp_path / "with" / "loss.png"
    assert "matplotlib" not in capsys.readouterr().out
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = made.train(made.model(), out=tmp_path / "without", call={"quiet": False})
    assert "curve" not in result.paths
    lines = [line for line in capsys.readouterr().out.splitlines() if "matplotlib" in line]
    assert lines == ["no loss curve: matplotlib is not installed (pip install 'minilora[plot]')"]
    assert plot.SMOOTHING_WINDOWS
