"""`minilora plan`: parameters, memory and files of full fine-tuning and LoRA, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import bytes_text, print_json, print_table, say
from .options import Json

if TYPE_CHECKING:
    from ..plan import Column, Plan

PARTS = (  # of Memory, and what they are called
    ("weights", "weights of the base"),
    ("adapter", "adapter"),
    ("gradients", "gradients"),
    ("optimiser", "Adam's moments"),
    ("activations", "activations"),
    ("working", "working memory"),
    ("peak", "peak"),
)


def command(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A published shape (llama-7b, qwen2.5-0.5b, gpt2 …), a directory with config.json, a .gguf file, "
            '"smollm2", or one matrix, such as 4096x4096.',
        ),
    ],
    rank: Annotated[str, typer.Option(help="Ranks r, separated by commas: a column for each.")] = "8",
    targets: Annotated[
        str, typer.Option(help='Which layers, as for train: "all-linear", endings of names, a regular expression.')
    ] = "all-linear",
    exclude: Annotated[str | None, typer.Option(help="Which of these not, in the same form.")] = None,
    dora: Annotated[bool, typer.Option("--dora", help="Train each output's magnitude apart (DoRA).")] = False,
    variant: Annotated[str, typer.Option(help="Another variant of LoRA: lora_fa trains B only.")] = "lora",
    modules_to_save: Annotated[
        str | None,
        typer.Option(help="Modules to train whole beside the adapters: endings of names separated by commas."),
    ] = None,
    bias: Annotated[str, typer.Option(help="Biases to train too: none, all, or lora_only.")] = "none",
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 1,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens per row. Default: 1024, or the model's context if shorter.", show_default=False),
    ] = None,
    checkpoint: Annotated[bool, typer.Option("--checkpoint", help="Recompute blocks in backward.")] = False,
    label_share: Annotated[float, typer.Option(help="The part of the tokens that carry a loss (above 0, to 1).")] = 1.0,
    device: Annotated[str, typer.Option(help="cpu or cuda. What is said of a GPU is an estimate.")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Hold a frozen base in float32, float64, float16 or bfloat16. Default: float32 on the CPU, bfloat16 "
            "on a GPU.",
            show_default=False,
        ),
    ] = None,
    adapter_dtype: Annotated[str, typer.Option(help="The dtype of the adapter's file.")] = "float32",
    as_json: Json = False,
) -> None:
    """Tell how much memory training takes, and on what it fits, for full fine-tuning and LoRA side by side.

    Nothing is loaded: the model's own code runs one training step on shapes. docs/plan.md has the accounting.
    """
    from ..lora import LoraConfig
    from ..plan import Step, plan
    from ..plan.plan import matrix_of
    from ..train.settings import names_in, parse_targets

    ranks = parse_ranks(rank)
    if (matrix := matrix_of(name)) is not None:
        show_matrix(matrix, ranks, as_json)
        return
    lora = LoraConfig(
        target_modules=parse_targets(targets),
        exclude_modules=None if exclude is None else parse_targets(exclude),
        use_dora=dora,
        variant=variant,
        modules_to_save=None if modules_to_save is None else names_in(modules_to_save),
        bias=bias,
    )
    loras = [lora.with_changes(r=each) for each in ranks]
    step = Step(batch_size, max_length, checkpoint, label_share, device)
    elsewhere = replace(step, device="cuda" if device == "cpu" else "cpu")
    main, other = (plan(name, loras, each, dtype, adapter_dtype) for each in (step, elsewhere))
    if as_json:
        print_json(as_data(main, other))
        return
    print_plan(main)
    for each in (main, other):
        print_fitting(each)


def parse_ranks(text: str) -> list[int]:
    """ "4,8,16" as numbers."""
    try:
        ranks = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected numbers such as 4,8,16", param_hint="--rank") from None
    if min(ranks) < 1:
        raise typer.BadParameter(f"{min(ranks)}: expected at least 1", param_hint="--rank")
    return ranks


# --- one matrix -----------------------------------------------------------------------------------------------------


def show_matrix(shape: tuple[int, int], ranks: Sequence[int], as_json: bool) -> None:
    """What LoRA of one matrix trains at each rank, beside training the matrix itself."""
    from ..plan.plan import adapter_parameters

    full = prod(shape)
    counts = [adapter_parameters(shape, rank) for rank in ranks]
    if as_json:
        ways = [
            {"rank": rank, "trained": count, "share": count / full} for rank, count in zip(ranks, counts, strict=True)
        ]
        print_json({"out": shape[0], "in": shape[1], "parameters": full, "lora": ways})
        return
    rows = [["full", f"{full:,}", "100 %"]]
    rows += [[f"rank {rank}", f"{count:,}", percent(count / full)] for rank, count in zip(ranks, counts, strict=True)]
    print_table([f"W of {shape[0]} × {shape[1]}", "trained>", "of W>"], rows)


# --- a model --------------------------------------------------------------------------------------------------------


def print_plan(plan: Plan) -> None:
    memory = plan.columns[0].memory
    stored = "" if plan.stored is None else f", {bytes_text(plan.stored)} in its file"
    say(f"{plan.name}: {memory.parameters:,} parameters{stored}")
    where = "the CPU" if plan.step.device == "cpu" else "a GPU (an estimate)"
    again = ", blocks recomputed in backward" if plan.step.checkpoint else ""
    say(
        f"  on {where}, batches of {plan.step.batch_size} × {plan.length} tokens, {percent(plan.step.label_share)} of "
        f"them with a loss{again}; LoRA holds the base in {plan.held}"
    )
    rows = [
        ["trained parameters", *(f"{column.memory.trained:,}" for column in plan.columns)],
        ["  of all", *(percent(column.share) for column in plan.columns)],
    ]
    for field, label in PARTS:
        rows.append([label, *(bytes_text(getattr(column.memory, field)) for column in plan.columns)])
    if plan.mapped:
        rows.append(["its file, mapped (may be dropped)", *(bytes_text(plan.mapped) for _ in plan.columns)])
    rows.append(["file that is saved", *(bytes_text(column.file) for column in plan.columns)])
    print_table(["", *(f"{title(column)}>" for column in plan.columns)], rows)


def print_fitting(plan: Plan) -> None:
    """On what the peaks have room, for machines of the plan's device."""
    from ..plan import fitting
    from ..plan.machines import GIB, MARGINS

    where = "fits on a computer" if plan.step.device == "cpu" else f"on a GPU, estimated ({plan.held})"
    rows = [
        [
            machine.name,
            f"{machine.memory} GiB, {bytes_text(machine.memory * GIB)}",
            bytes_text(machine.usable),
            *("yes" if fits else "–" for fits in each),
        ]
        for machine, each in fitting(plan).items()
    ]
    print_table([where, "memory>", "of it for a run>", *(f"{title(column)}>" for column in plan.columns)], rows)
    say(f"  {MARGINS[plan.step.device]}")


def title(column: Column) -> str:
    if column.lora is None:
        return "full fine-tuning"
    kind = "DoRA" if column.lora.use_dora else {"lora": "LoRA", "lora_fa": "LoRA-FA"}[column.lora.variant]
    return f"{kind}, rank {column.lora.r}"


def percent(share: float) -> str:
    """One digit after the point, or two that count."""
    if share >= 0.0995:
        return f"{100 * share:.3g} %"
    return f"{100 * share:.1f} %" if share >= 0.001 else f"{100 * share:.2g} %"


def as_data(main: Plan, other: Plan) -> dict[str, Any]:
    """The plan, and what fits on machines of its own and the other device."""
    from ..plan import fitting
    from ..plan.machines import MACHINES, MARGINS

    fits = {plan.step.device: fitting(plan) for plan in (main, other)}
    ways = [
        {
            "method": "full" if column.lora is None else "lora",
            "rank": None if column.lora is None else column.lora.r,
            "trained": column.memory.trained,
            "share": column.share,
            "bytes": {field: getattr(column.memory, field) for field, _ in PARTS} | {"file": column.file},
            "fits": {
                device: {machine.name: each[index] for machine, each in machines.items()}
                for device, machines in fits.items()
            },
        }
        for index, column in enumerate(main.columns)
    ]
    return {
        "model": main.name,
        "parameters": main.columns[0].memory.parameters,
        "stored_bytes": main.stored,
        "mapped_bytes": main.mapped,
        "dtype": main.held,
        **asdict(main.step),
        "length": main.length,
        "ways": ways,
        "machines": {
            device: [
                {"name": machine.name, "memory_gib": machine.memory, "usable_bytes": machine.usable}
                for machine in machines
            ]
            for device, machines in MACHINES.items()
        },
        "margins": MARGINS,
    }
