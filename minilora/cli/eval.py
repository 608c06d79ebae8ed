"""`minilora eval`: how well a model, with and without adapters, predicts a data set and completes its prompts."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MiniloraError
from ..files import atomic_write, check_writable
from .console import note, print_json, print_table, progress
from .options import AdapterDirectories, Device, Dtype, Json, ModelName, open_model

if TYPE_CHECKING:
    from ..data import Dataset, Example
    from ..model import Model

SPARE_TOKENS = 8  # beyond the longest right completion: a completion may be spelled in other tokens than the data's


@dataclass
class Result:
    """One row of the table. adapter: its directory, None for the bare base. loss: in nats per label token."""

    adapter: str | None
    loss: float
    perplexity: float
    exact_match: float | None = None
    exact_matches: int | None = None
    seconds: float = 0.0


def command(
    model: ModelName,
    data: Annotated[Path, typer.Option(help="A .jsonl file, or a folder with test.jsonl, valid.jsonl, train.jsonl.")],
    adapter: AdapterDirectories = None,
    base: Annotated[bool, typer.Option(help="Evaluate the bare base, too.")] = True,
    split: Annotated[
        str | None,
        typer.Option(help="test, valid or train: which file of the folder. Default: the first of these that is there."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many rows only.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens per row, longer rows are cut. Default: 1024, or the model's context if shorter."),
    ] = None,
    mask_prompt: Annotated[bool, typer.Option(help="Count completions and assistant turns only.")] = True,
    exact_match: Annotated[
        bool | None,
        typer.Option(
            "--exact-match/--no-exact-match",
            help="Complete each prompt greedily and count the completions that are right, but for white space at the "
            "ends. Default: where the rows have a completion.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per completion. Default: enough for the longest right one.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Write every completion to this JSON Lines file (for --exact-match).")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Measure loss, perplexity and exact match on a data set, for the base and for each adapter."""
    from ..data import load_data
    from ..train import TrainConfig

    directories = adapter or []
    if not base and not directories:
        raise typer.BadParameter("leaves nothing to evaluate without an --adapter", param_hint="--no-base")
    if predictions is not None and exact_match is False:
        raise typer.BadParameter("there are none with --no-exact-match", param_hint="--predictions")
    if predictions is not None:
        if predictions.is_dir():
            raise MiniloraError(f"--predictions {predictions} is a folder, expected a file or nothing there")
        check_writable(predictions)
    file = split_file(data, split)
    loaded = open_model(model, directories, device, dtype)
    length = TrainConfig(max_length=max_length).row_length(loaded.config.max_position_embeddings)
    rows = load_data(file, loaded.tokenizer, length, mask_prompt)
    note(described(rows))
    examples = rows.train[:limit]
    with_completion = [example for example in examples if example.completion is not None]
    if exact_match and not with_completion:
        raise MiniloraError(
            f"{file} has no row with a completion and a prompt that fits {length} tokens, as --exact-match needs: "
            "expected prompt and completion, or messages"
        )
    compared = with_completion if exact_match is not False else []
    results, lines = [], []
    for name in [None] * base + [str(number) for number in range(len(directories))]:
        loaded.set_adapter(name)
        label = None if name is None else str(directories[int(name)])
        result, completions = evaluate_one(loaded, label, examples, compared, batch_size, max_new_tokens)
        results.append(result)
        lines += [{"adapter": label, **line} for line in completions]
    if predictions is not None:
        atomic_write(predictions, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    labels = sum(example.label_count for example in examples)
    if as_json:
        about = {"model": model, "data": str(file), "rows": len(examples), "label_tokens": labels}
        print_json(about | {"prompts": len(compared), "results": [asdict(result) for result in results]})
    else:
        print_results(model, results, len(compared))


def split_file(data: Path, split: str | None) -> Path:
    """The one file to evaluate on; MiniloraError where it is not there."""
    from ..data.dataset import SPLITS

    if split is not None and split not in SPLITS:
        raise typer.BadParameter(f"{split!r} is none of {', '.join(SPLITS)}", param_hint="--split")
    if not data.is_dir():
        if split is not None:
            raise typer.BadParameter("chooses a file of a folder, and --data is a file", param_hint="--split")
        return data
    for name in reversed(SPLITS) if split is None else [split]:
        if (file := data / f"{name}.jsonl").is_file():
            return file
    expected = f"{split}.jsonl" if split is not None else "test.jsonl, valid.jsonl or train.jsonl"
    found = ", ".join(sorted(file.name for file in data.glob("*.jsonl"))) or "no .jsonl file"
    raise MiniloraError(f"{data}: found {found}, expected {expected}: choose another --split, or give the file itself")


def described(rows: Dataset) -> str:
    """What was read and left out, in a line that begins with the file."""
    report = rows.files["train"]
    return f"{report.path}: {rows.summary().removeprefix('train: ')}"


def evaluate_one(
    model: Model,
    label: str | None,
    examples: Sequence[Example],
    compared: Sequence[Example],
    batch_size: int,
    max_new_tokens: int | None,
) -> tuple[Result, list[dict[str, Any]]]:
    """The loss on `examples` and the exact matches on `compared`, under the selected adapter; and the completions."""
    from ..train import evaluate

    assert model.tokenizer is not None  # the examples were made with it
    begin = time.perf_counter()
    loss = evaluate(model, examples, batch_size)
    if not math.isfinite(loss):
        raise MiniloraError(
            f"the loss with {label or 'the base'} is {loss}, expected a finite number: its weights are damaged, or "
            "--dtype is too narrow for them; try --dtype float32"
        )
    result = Result(label, loss, math.exp(loss) if loss < 700 else math.inf)
    lines: list[dict[str, Any]] = []
    if compared:
        with progress(f"completing with {label or 'the base'}", len(compared)) as advance:
            completions = complete(model, compared, batch_size, max_new_tokens, advance)
        for example, ids in zip(compared, completions, strict=True):
            text = model.tokenizer.decode(ids)
            expected = str(example.completion)
            prompt = model.tokenizer.decode(example.tokens[: example.prompt_length], skip_special_tokens=False)
            same = text.strip() == expected.strip()
            lines.append({"prompt": prompt, "expected": expected, "completion": text, "exact_match": same})
        result.exact_matches = sum(line["exact_match"] for line in lines)
        result.exact_match = result.exact_matches / len(compared)
    result.seconds = time.perf_counter() - begin
    return result, lines


def complete(
    model: Model,
    examples: Sequence[Example],
    batch_size: int,
    max_new_tokens: int | None,
    advance: Callable[[int], None],
) -> list[list[int]]:
    """The greedy completion of each example's prompt, as token ids."""
    from ..generate import generate_batch

    prompts = [example.tokens[: example.prompt_length] for example in examples]
    if max_new_tokens is None:
        longest = max(len(example.tokens) - example.prompt_length for example in examples)
        room = model.config.max_position_embeddings - max(len(prompt) for prompt in prompts)
        max_new_tokens = min(longest + SPARE_TOKENS, room)
    completions = generate_batch(model, prompts, max_new_tokens, batch_size=batch_size, progress=advance)
    return [ids for ids in completions if isinstance(ids, list)]


def print_results(model: str, results: Sequence[Result], prompts: int) -> None:
    columns = ["", "loss>", "perplexity>", *(["exact match>"] if prompts else []), "seconds>"]
    table = []
    for result in results:
        row = [result.adapter or f"{model} (base)", f"{result.loss:.4f}", f"{result.perplexity:,.3f}"]
        if prompts:
            row.append(f"{result.exact_match:.1%} ({result.exact_matches:,} of {prompts:,})")
        table.append([*row, f"{result.seconds:.1f}"])
    print_table(columns, table)
