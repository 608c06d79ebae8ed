"""`minilora train`: an adapter for a model, from a file of examples to a folder that PEFT loads."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.dataset import find_files
from ..lora import LoraConfig
from ..train import TrainConfig, TrainResult, train
from ..train.folder import SETTINGS, check_folder
from ..train.settings import ADAPTER_KEYS, adapter_settings, lora_config, read_settings, train_config
from .console import print_json

ADAPTER_NAME = "default"  # as PEFT calls it
DEFAULTS = {"device": "cpu", "dtype": "float32"}
NOT_SETTINGS = ("config", "resume", "overwrite", "quiet", "as_json")  # they are about this call, not about the run

_run, _lora = TrainConfig(), LoraConfig()


def _option(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help, show_default=False)


def command(
    model: Annotated[
        str | None,
        _option(help='What to fine-tune: a model directory, a .gguf file, "mini", "smollm2" or a hub id "owner/name".'),
    ] = None,
    data: Annotated[
        Path | None,
        _option(
            help='JSON Lines with "text", "prompt" and "completion", or "messages"; or a folder with train.jsonl '
            "and, for validation, valid.jsonl."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        _option(help="The folder to write: the adapter in PEFT's format, metrics, the loss curve, the settings."),
    ] = None,
    rank: Annotated[int | None, _option(help=f"Rank r of the update s · B A. Default: {_lora.r}.")] = None,
    alpha: Annotated[float | None, _option(help=f"Scale s = alpha / rank. Default: {_lora.alpha:g}.")] = None,
    targets: Annotated[
        str | None,
        _option(
            help='Which layers: "all-linear" (all but the head; the default), endings of names separated by commas, '
            "such as q_proj,v_proj,embed_tokens,lm_head (embeddings and the head only if they are named), or a regular "
            "expression for the whole name: it is one if it has any of "
            r"\ ^ $ * + ? | ( ) [ ] { }."
        ),
    ] = None,
    exclude: Annotated[str | None, _option(help="Which of these not, in the same form.")] = None,
    dropout: Annotated[
        float | None, _option(help=f"Dropout on the adapters' input. Default: {_lora.dropout:g}.")
    ] = None,
    rslora: Annotated[
        bool | None, _option("--rslora/--no-rslora", help="Scale s = alpha / √rank instead. Default: no.")
    ] = None,
    dora: Annotated[
        bool | None, _option("--dora/--no-dora", help="Train each output's magnitude apart (DoRA). Default: no.")
    ] = None,
    variant: Annotated[
        str | None, _option(help=f"Another variant of LoRA: lora_fa trains B only. Default: {_lora.variant}.")
    ] = None,
    init: Annotated[
        str | None,
        _option(
            help="How A starts, with B = 0: kaiming or gaussian; or pissa, both from the largest singular values of W "
            f"(pissa_niter_4: found by 4 power iterations, much sooner). Default: {_lora.init}."
        ),
    ] = None,
    modules_to_save: Annotated[
        str | None,
        _option(
            help="Modules to train whole beside the adapters, in copies of their own: endings of names separated by "
            "commas, such as lm_head,model.norm. Default: none."
        ),
    ] = None,
    bias: Annotated[
        str | None,
        _option(help=f"Biases to train too: none, all, or lora_only (the adapted layers'). Default: {_lora.bias}."),
    ] = None,
    adapter: Annotated[
        Path | None, _option(help="Go on training this adapter (a PEFT directory) instead of a new one.")
    ] = None,
    steps: Annotated[int | None, _option(help="Optimiser steps. Default: as many as --epochs takes.")] = None,
    epochs: Annotated[int | None, _option(help="Passes over the data. Default: 1.")] = None,
    batch_size: Annotated[int | None, _option(help=f"Rows per forward pass. Default: {_run.batch_size}.")] = None,
    accumulate: Annotated[
        int | None,
        _option(help=f"Forward passes per step; all label tokens weigh the same. Default: {_run.accumulate}."),
    ] = None,
    lr: Annotated[float | None, _option(help=f"Learning rate. Default: {_run.lr:g}.")] = None,
    lora_plus_ratio: Annotated[
        float | None, _option(help="B's learning rate is this many times --lr (LoRA+), e.g. 16. Default: the same.")
    ] = None,
    schedule: Annotated[
        str | None, _option(help=f"constant, linear or cosine, after the warm-up. Default: {_run.schedule}.")
    ] = None,
    warmup: Annotated[
        str | None,
        _option(
            help=f"Steps (10), or a fraction of all steps (0.1), over which the rate rises. Default: {_run.warmup:g}."
        ),
    ] = None,
    weight_decay: Annotated[float | None, _option(help=f"AdamW's, decoupled. Default: {_run.weight_decay:g}.")] = None,
    max_grad_norm: Annotated[
        float | None, _option(help=f"Clip the gradients' norm to this; 0: not. Default: {_run.max_grad_norm:g}.")
    ] = None,
    max_length: Annotated[
        int | None,
        _option(help="Tokens per row, longer rows are cut. Default: 1024, or the model's context if shorter."),
    ] = None,
    packing: Annotated[
        bool | None,
        _option("--packing/--no-packing", help="Join whole documents into rows of --max-length. Default: no."),
    ] = None,
    mask_prompt: Annotated[
        bool | None,
        _option("--mask-prompt/--no-mask-prompt", help="Learn completions and assistant turns only. Default: yes."),
    ] = None,
    valid_fraction: Annotated[
        float | None, _option(help="Hold this part of the rows back for validation. Default: none.")
    ] = None,
    checkpoint: Annotated[
        bool | None,
        _option(
            "--checkpoint/--no-checkpoint", help="Recompute blocks in backward: less memory, more time. Default: no."
        ),
    ] = None,
    eval_every: Annotated[
        int | None,
        _option(help="Validate every so many steps, and keep the best in OUT/best. Default: at the end only."),
    ] = None,
    save_every: Annotated[
        int | None,
        _option(help="Save every so many steps, also to OUT/checkpoints. Default: at the end and on Ctrl-C."),
    ] = None,
    keep: Annotated[int | None, _option(help=f"Saves that OUT/checkpoints holds. Default: {_run.keep}.")] = None,
    sample_prompt: Annotated[
        list[str] | None,
        _option(help="A text that the model continues along the way, for the report; may be given several times."),
    ] = None,
    sample_every: Annotated[
        int | None, _option(help="Continue the --sample-prompt every so many steps. Default: eight times in the run.")
    ] = None,
    seed: Annotated[
        int | None, _option(help=f"Decides the adapter's start, the order of rows, dropout. Default: {_run.seed}.")
    ] = None,
    device: Annotated[str | None, _option(help=f"cpu, cuda or cuda:N. Default: {DEFAULTS['device']}.")] = None,
    dtype: Annotated[
        str | None,
        _option(
            help="Hold the base in float32, float64, float16 or bfloat16; stored: as the file has it, a GGUF's blocks "
            f"too. Default: {DEFAULTS['dtype']}."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        _option(help=f"A TOML file with these options; the command line wins. Every run leaves one: OUT/{SETTINGS}."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, to the very numbers of an unbroken run.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print warnings and errors only.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print nothing on the way, and what came of it as JSON at the end.")
    ] = False,
) -> None:
    """Fine-tune a model: train a low-rank adapter on your examples, the base staying as it is."""
    given = {name: value for name, value in locals().items() if value is not None and name not in NOT_SETTINGS}
    if warmup is not None:
        given["warmup"] = _number(warmup)
    if config is None and resume and out is not None:
        check_folder(out, resume, overwrite)
        config = out / SETTINGS
    settings = _merged(DEFAULTS, {} if config is None else read_settings(config), given)
    if "adapter" in settings and (shape := ADAPTER_KEYS.keys() & given.keys()):
        raise typer.BadParameter("the adapter to go on with has its own: leave it out", param_hint=f"--{min(shape)}")
    for name in ("model", "data", "out"):
        if name not in settings:
            raise typer.BadParameter("expected it here or in --config", param_hint=f"--{name}")
    result = _train(settings, resume, overwrite, quiet or as_json)
    if as_json:
        print_json(
            {key: value for key, value in asdict(result).items() if key != "history"}
            | {"paths": {name: str(path) for name, path in result.paths.items()}}
        )


def _train(settings: dict[str, Any], resume: bool, overwrite: bool, quiet: bool) -> TrainResult:
    from ..loading import load_model

    run, lora = train_config(settings), lora_config(settings)
    check_folder(Path(settings["out"]), resume, overwrite)
    find_files(Path(settings["data"]))  # before the model, which may take a minute
    model = load_model(settings["model"], settings["device"], settings["dtype"])
    if "adapter" in settings:
        model.load_adapter(ADAPTER_NAME, settings["adapter"])
    else:
        model.add_adapter(ADAPTER_NAME, lora, seed=run.seed)
    used = settings | adapter_settings(model.adapters[ADAPTER_NAME])
    return train(model, settings["data"], run, resume=resume, overwrite=overwrite, quiet=quiet, settings=used)


def _merged(*sources: dict[str, Any]) -> dict[str, Any]:
    """The settings of all sources, the last one winning; what excludes an earlier one's setting removes it."""
    settings: dict[str, Any] = {}
    for source in sources:
        for name, other in (("steps", "epochs"), ("epochs", "steps")):
            if name in source and other not in source:
                settings.pop(other, None)
        settings |= source
    return settings


def _number(text: str) -> int | float:
    try:
        return int(text) if text.strip().isdigit() else float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number", param_hint="--warmup") from None
