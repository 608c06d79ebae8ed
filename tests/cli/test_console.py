"""What commands show while they work."""

from minilora.cli import console


def test_a_log_hears_now_and_then_how_far_it_is(monkeypatch, capsys):
    now = iter([0.0, 10.0, 61.0, 61.0, 80.0, 130.0, 130.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with console.progress("completing", 4_000) as advance:
        for _ in range(4):
            advance(1_000)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "completing: 2,000 of 4,000\ncompleting: 4,000 of 4,000\n"
