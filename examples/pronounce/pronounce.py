"""Teaches SmolLM2 to write American English pronunciations, and measures what it learned on words it has not seen.

    python examples/pronounce/pronounce.py RUN              under an hour on two CPU cores
    python examples/pronounce/pronounce.py RUN --steps 20 --test 50 --baseline 10        a minute, to see that it works

Leaves in RUN: data/ (the rows), adapter/ (a PEFT directory), results.json, results.md. `--publish` also puts the table
and the loss curve into this folder's README. Training is `minilora train`, whose command line is printed.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metrics import Score, score
from prepare import prepare

import minilora as ml
from minilora.generate import end_tokens, generate_batch

HERE = Path(__file__).parent
LONGEST = 48  # tokens of an answer: the longest pronunciation of the dictionary takes 46, its end one more
TOGETHER = 32  # words written at once
SAMPLES = 10  # words shown in the README

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def evaluate(model: ml.Model, rows: Sequence[Row], examples: Sequence[Row] = ()) -> tuple[Score, list[str]]:
    """Scores the model on the rows; `examples` are solved rows that each prompt starts with."""
    shown = "".join(f"{row['prompt']}{row['completion']}\n" for row in examples)
    prompts = [shown + row["prompt"] for row in rows]
    end = [*end_tokens(model), "\n"]
    answers = generate_batch(model, prompts, max_new_tokens=LONGEST, batch_size=TOGETHER, stop=end)
    written = [str(answer).strip() for answer in answers]
    return score(written, [row["references"] for row in rows]), written


def train_command(model: str, run: Path, options: argparse.Namespace) -> list[str]:
    settings = {
        "model": model,
        "data": run / "data",
        "out": run / "adapter",
        "rank": options.rank,
        "alpha": 2 * options.rank,
        "lr": options.lr,
        "steps": options.steps,
        "warmup": max(1, options.steps // 20),
        "schedule": "cosine",
        "batch-size": options.batch_size,
        "max-length": 80,
        "eval-every": max(1, options.steps // 5),
        "seed": options.seed,
        "device": options.device,
        "dtype": options.dtype,
    }
    return ["train", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


def run_all(run: Path, options: argparse.Namespace) -> dict[str, Any]:
    sizes = prepare(run / "data", test=options.test, seed=options.seed)
    rows = read_rows(run / "data" / "test.jsonl")
    baseline = rows[: options.baseline]

    model = ml.load_model(options.model, options.device, options.dtype)
    if model.tokenizer is None:
        raise ml.MiniloraError(f"{options.model} has no tokenizer, which text needs: put tokenizer.json beside it")
    print(f"before training, on {len(baseline)} unseen words ...", flush=True)
    before, _ = evaluate(model, baseline)
    few_shot, _ = evaluate(model, baseline, examples=read_rows(run / "data" / "train.jsonl")[:5])

    command = train_command(options.model, run, options)
    print("minilora", *command, flush=True)
    started = time.perf_counter()
    if status := subprocess.run([sys.executable, "-m", "minilora", *command]).returncode:
        raise SystemExit(status)  # it has said why
    seconds = time.perf_counter() - started

    print(f"after training, on {len(rows)} unseen words ...", flush=True)
    model.load_adapter("pronounce", run / "adapter", trainable=False)
    after, written = evaluate(model, rows)
    return {
        "command": " ".join(["minilora", *command]).replace(str(run), "RUN"),
        "rows": sizes,
        "rows_trained_on": options.steps * options.batch_size,
        "minutes_of_training": seconds / 60,
        "scores": {
            "before": asdict(before),
            "before, five examples in the prompt": asdict(few_shot),
            "after": asdict(after),
        },
        "samples": [
            {"word": row["word"], "written": text, "references": row["references"]}
            for row, text in list(zip(rows, written, strict=True))[:SAMPLES]
        ],
    }


def as_markdown(results: dict[str, Any]) -> str:
    """The results as the README shows them: the table of scores, how they came about, and the first test words."""
    lines = [
        "| | words | exact match | phoneme error rate | exact, stress ignored | error rate, stress ignored |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, value in results["scores"].items():
        scores = Score(**value)
        lines.append(
            f"| {name} | {scores.words:,} | {scores.exact_match:.1%} | {scores.phoneme_error_rate:.1%} "
            f"| {scores.exact_match_without_stress:.1%} | {scores.phoneme_error_rate_without_stress:.1%} |"
        )
    rows = results["rows"]
    lines += [
        "",
        f"Trained on {results['rows_trained_on']:,} of {rows['train']:,} rows "
        f"in {results['minutes_of_training']:.0f} minutes:",
        "",
        f"    {results['command']}",
        "",
        f"The first {len(results['samples'])} test words:",
        "",
        "| word | written | accepted |",
        "| --- | --- | --- |",
    ]
    for sample in results["samples"]:
        mark = "" if sample["written"] in sample["references"] else " ✗"
        lines.append(f"| {sample['word']} | {sample['written']}{mark} | {', or '.join(sample['references'])} |")
    return "\n".join(lines) + "\n"


def publish(markdown: str, readme: Path) -> None:
    """Replaces what stands between the two `results` marks of the README."""
    text = readme.read_text(encoding="utf-8")
    marked = re.compile(r"(<!-- results -->\n).*(<!-- end of results -->)", re.S)
    if not marked.search(text):
        raise SystemExit(f"{readme} has no place for the table: add <!-- results --> and <!-- end of results -->")
    readme.write_text(marked.sub(lambda match: match[1] + markdown + match[2], text), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach SmolLM2 to write pronunciations; measure it on unseen words.")
    parser.add_argument("run", type=Path, help="the folder for data, adapter and results")
    parser.add_argument("--model", default="smollm2", help="as for `minilora train` (default smollm2)")
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--test", type=int, default=500, help="unseen words to score after training (default 500)")
    parser.add_argument("--baseline", type=int, default=100, help="how many of them to score before it (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda through CuPy")
    parser.add_argument("--dtype", default="float32", help="of the base's weights (default float32; bfloat16 on a GPU)")
    parser.add_argument("--publish", action="store_true", help="put the table and the loss curve into the README")
    options = parser.parse_args()

    try:
        results = run_all(options.run, options)
    except ml.MiniloraError as error:
        raise SystemExit(f"error: {error}") from None
    markdown = as_markdown(results)
    (options.run / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (options.run / "results.md").write_text(markdown, encoding="utf-8")
    if options.publish:
        publish(markdown, HERE / "README.md")
        shutil.copy(next((options.run / "adapter").glob("*.png")), HERE / "loss.png")
    print("", markdown, sep="\n")


if __name__ == "__main__":
    main()
