"""`minilora report` writes the page where it says, and prints what is in it."""

import json

import pytest


@pytest.fixture(scope="module")
def finished(run, base, tmp_path_factory):
    """The folder of a run of three steps."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {n} of few"}) + "\n" for n in range(8)))
    status, _, error = run(
        "train", "--model", base, "--data", folder / "rows.jsonl", "--out", folder / "mine", "--steps", 3, "--rank", 2,
        "--sample-prompt", "row", "--sample-every", 1, "--quiet",
    )  # fmt: skip
    assert status == 0, error
    return folder / "mine"


def test_the_page_lies_in_the_runs_folder_and_a_table_says_what_it_is_of(run, finished):
    status, output, error = run("report", finished)
    assert status == 0, error
    assert "mine" in output
    assert f"wrote {finished / 'report.html'}" in error
    html = (finished / "report.html").read_text("utf-8")
    assert html.startswith("<!DOCTYPE html>")
    assert "What it writes, as training goes on" in html


def test_json_has_the_numbers_and_nothing_else(run, finished, tmp_path):
    status, output, _ = run("report", finished, "--out", tmp_path / "page.html", "--json")
    found = json.loads(output)
    assert status == 0
    assert found["report"] == str(tmp_path / "page.html")
    assert found["bytes"] == (tmp_path / "page.html").stat().st_size
    (facts,) = found["runs"]
    assert (facts["steps"], facts["adapted_layers"]) == (3, 14)
    assert facts["update_norm"] > 0


def test_several_runs_need_a_place_for_the_page(run, finished, tmp_path):
    status, _, error = run("report", finished, finished)
    assert status == 2
    assert "--out" in error
    status, _, _ = run("report", finished, finished, "--out", tmp_path / "both.html")
    assert status == 0
    assert "Side by side" in (tmp_path / "both.html").read_text("utf-8")


def test_what_is_no_run_is_one_line_and_nothing_is_written(run, tmp_path):
    status, output, error = run("report", tmp_path)
    assert (status, output) == (1, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_does_not_fit_is_one_line(run, finished, tmp_path):
    status, _, error = run("report", finished, "--model", tmp_path, "--out", tmp_path / "page.html")
    assert status == 1
    assert error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()
