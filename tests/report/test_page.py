"""A report says what the run's folder holds, in one file that loads nothing; a damaged run is one line."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import minilora as ml
from minilora.report.page import Page, Section, Table, Text, render, report_on, write_page
from minilora.report.run import find_runs, read_records, read_run
from tests import texts
from tests.train import made

VOID = {"meta", "br", "line", "path", "circle", "rect"}


class Checked(HTMLParser):
    """Follows the tags, which have to nest, and gathers the text and what would be loaded."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.loaded: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.loaded += [f"{tag} {name}={value}" for name, value in attributes if name in ("src", "srcset", "data")]
        self.loaded += [value for name, value in attributes if name == "href" and not value.startswith("#")]
        self.loaded += [tag] if tag in ("script", "link", "iframe", "img") else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with validation losses and samples, on a base that is saved beside it."""
    folder = tmp_path_factory.mktemp("runs")
    base = texts.model()
    base.save(folder / "base")
    model = ml.load_model(folder / "base")
    model.add_adapter("a", ml.LoraConfig(r=3, alpha=6, target_modules=["q_proj", "down_proj"]), seed=0)
    made.train(
        model, steps=6, out=folder / "mine", eval_every=3, sample_prompt=["<b>once"], sample_every=3,
        call={"valid": made.examples(4, seed=1)},
    )  # fmt: skip
    return folder / "mine"


def test_the_page_is_one_file_that_loads_nothing(run):
    page = Checked(render(report_on([read_run(run)])))
    assert page.loaded == []
    assert "default-src 'none'" in render(report_on([read_run(run)]))


def test_the_page_has_the_losses_the_curves_the_samples_and_the_spectra(run):
    html = render(report_on([read_run(run)]))
    for title in ("Loss", "Learning rate", "Gradient norm, before clipping", "Memory in use", "Singular values of ΔW"):
        assert f"<figcaption>{title}" in html
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min(record["validation_loss"] for record in records if "validation_loss" in record)
    assert f"{best:.4f}" in html
    assert "‖ΔW‖ / ‖W‖" in html
    text = "".join(Checked(html).text)
    for record in records:
        if "samples" in record:
            assert record["samples"]["<b>once"] in text
    assert "<b>once" not in html


def test_without_the_base_the_page_shows_the_update_alone_and_says_so(run, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("metrics.jsonl", "adapter_config.json", "adapter_model.safetensors"):
        (moved / name).write_bytes((run / name).read_bytes())
    settings = re.sub(r"^model = .*$", 'model = "someone/else"', (run / "minilora.toml").read_text(), flags=re.M)
    (moved / "minilora.toml").write_text(settings)
    read = read_run(moved)
    assert read.base is None
    html = render(report_on([read]))
    assert "someone/else is not a folder here" in html
    assert "<figcaption>‖ΔW‖</figcaption>" in html


def test_several_runs_stand_side_by_side_and_each_has_its_section(run):
    html = render(report_on([read_run(run), read_run(run)]))
    assert "Side by side" in html
    assert html.count("What the adapter changed") == 2
    Checked(html)


def test_a_folder_of_runs_is_all_of_them(run, tmp_path):
    assert find_runs(run) == [run]
    assert find_runs(run.parent) == [run]
    with pytest.raises(ml.MiniloraError, match="holds no run"):
        find_runs(tmp_path)
    with pytest.raises(ml.MiniloraError, match="no such file or folder"):
        find_runs(tmp_path / "nothing")


def test_half_a_last_line_is_left_out_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_records(path) == [{"step": 1, "loss": 2.0}]
    path.write_text('{"step": 1, "loss": 2.0}\nnonsense\n')
    with pytest.raises(ml.MiniloraError, match="line 2"):
        read_records(path)
    path.write_text('{"loss": 2.0}\n')
    with pytest.raises(ml.MiniloraError, match=r"line 1.*expected an object with a step"):
        read_records(path)
    path.write_text('{"step": 0, "validation_loss": 2.0}\n')
    with pytest.raises(ml.MiniloraError, match="no step with a loss yet"):
        read_records(path)


def test_text_of_the_page_is_escaped_and_columns_are_aligned(tmp_path):
    page = Page("<t>", sections=[Section("s", [Text("a < b"), Table(["x", "n>"], [["<i>", "1"]])])])
    write_page(page, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text("utf-8")
    assert "<t>" not in html
    assert "<i>" not in html
    assert '<td class="right">1</td>' in html
    Checked(html)


def made_run(tmp_path, records) -> Path:
    """A run's folder with just these records, steps from 1 on."""
    lines = [json.dumps({"step": number, "loss": 1.0, **record}) + "\n" for number, record in enumerate(records, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    (tmp_path / "minilora.toml").write_text("rank = 2\n")
    return tmp_path


def tiles_of(folder) -> dict[str, str]:
    (tiles,) = [block for block in report_on([read_run(folder)]).sections[0].blocks if block.kind == "tiles"]
    return {what: number for number, what in tiles.tiles}


def test_the_lowest_validation_loss_is_told_with_its_step_wherever_it_was(tmp_path):
    losses = [3.0, 1.25, 2.0]
    tiles = tiles_of(made_run(tmp_path, [{"validation_loss": loss} for loss in losses]))
    assert tiles["lowest validation loss, step 2"] == "1.2500"


def test_the_time_in_steps_is_of_each_steps_own_tokens(tmp_path):
    """100 tokens at 10 a second, 300 more at 30: 20 s; and the median of three speeds."""
    records = [{"tokens": 100, "tokens_per_second": 10.0}, {"tokens": 400, "tokens_per_second": 30.0}]
    tiles = tiles_of(made_run(tmp_path, records))
    assert tiles["in training steps"] == "0:20"
    assert tiles["tokens seen"] == "400"


def test_memory_is_shown_in_gigabytes(tmp_path):
    records = [{"memory": 2_500_000_000}, {"memory": 2_750_000_000}]
    html = render(report_on([read_run(made_run(tmp_path, records))]))
    assert "memory: 2.5 at 1, 2.75 at 2" in html
