"""`minilora demo` on the model in the package: text for people, JSON for machines, nothing when it is to be quiet."""

import json

import pytest

from minilora.demo import show as demo


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Fewer tokens are timed and fewer dates are written, which is most of the time that one step takes."""
    monkeypatch.setattr(demo, "SPEED_BATCH", (1, 16))
    monkeypatch.setattr(demo, "SPEED_ROUNDS", 1)
    monkeypatch.setattr(demo, "exactly_right", lambda model, rows, plain=demo.exactly_right: plain(model, rows[:4]))


@pytest.mark.slow
def test_the_demo_tells_of_each_part_and_says_what_to_do_next(run, tmp_path):
    status, output, error = run("demo", "--out", tmp_path / "demo", "--steps", 1)
    assert (status, error) == (0, "")
    parts = [
        "The base",
        "Three adapters",
        "One base, switched",
        "What was trained",
        "Merged",
        "Gradients checked",
        "Done",
    ]
    places = [output.index(part) for part in parts]
    assert places == sorted(places)
    assert "all agree" in output
    assert "bit for bit" in output
    assert f"{tmp_path / 'demo' / 'report.html'}" in output
    assert "minilora train --model mini --data rows.jsonl" in output
    assert not any(line.endswith(" " * 40) for line in output.splitlines())


@pytest.mark.slow
def test_json_is_one_document_and_a_second_demo_replaces_the_first(run, tmp_path):
    for seed in (1, 2):
        status, output, error = run("demo", "--out", tmp_path / "demo", "--steps", 1, "--seed", seed, "--json")
        assert (status, error) == (0, "")
    found = json.loads(output)
    assert found["seed"] == 2
    assert found["model"] == "mini"
    assert [task["name"] for task in found["learned"]] == ["king-james", "devil", "dates"]
    assert found["merged"]["restored"]
    assert found == json.loads((tmp_path / "demo" / "demo.json").read_text()) | {"report": found["report"]}


def test_a_folder_of_something_else_is_one_line(run, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    status, output, error = run("demo", "--out", tmp_path)
    assert (status, output) == (1, "")
    assert error == f"error: {tmp_path} is not empty and holds no earlier demo (demo.json): choose another --out\n"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert run("demo", "--steps", 0, "--out", tmp_path / "new")[0] in (1, 2)
    assert not (tmp_path / "new").exists()
