"""`minilora bench`: how fast training and decoding are on this machine, beside what its matrix products allow."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from ..errors import MiniloraError
from .console import bytes_text, note, print_json, print_table, say
from .options import Device, Dtype, Json, ModelName

if TYPE_CHECKING:
    from ..model import Model

GEMM_SIZE, GEMM_SECONDS = 1024, 1.0  # for the machine's own speed at matrix products
PROMPT_LENGTH = 32  # of the sequence that decoding continues


@dataclass(frozen=True)
class Result:
    """seconds: the median of the runs. gemm_share: of the machine's speed at matrix products, where that is the limit.
    read_bytes_per_second: of weights, where reading them is the limit.
    """

    what: str
    tokens: int
    seconds: float
    peak_bytes: int
    gemm_share: float | None = None
    read_bytes_per_second: float | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def command(
    model: ModelName = "smollm2",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a training batch.")] = 4,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 256,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 8,
    targets: Annotated[
        str, typer.Option(help='Which layers, as for train: "all-linear", endings of names, a regular expression.')
    ] = "all-linear",
    checkpoint: Annotated[bool, typer.Option("--checkpoint", help="Recompute activations in backward.")] = False,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 64,
    seconds: Annotated[
        float, typer.Option(min=0, help="Repeat each measurement for about so long, and at least twice.")
    ] = 10.0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Measure training and decoding on your machine and model: tokens/s, how near the limit, peak memory.

    The limit of training is the machine's speed at matrix products, measured here first: a step needs 4 operations for
    each token and weight, and attention's. Decoding has to read every weight for every token; the speed of that is
    shown. Tokens are random.
    """
    from ..kernels.cpu.threads import thread_count
    from ..loading import load_model
    from ..lora import LoraConfig
    from ..train.settings import parse_targets

    loaded = load_model(model, device, dtype)
    context = loaded.config.max_position_embeddings
    longest = max(max_length, PROMPT_LENGTH + new_tokens)
    if longest > context:
        raise MiniloraError(
            f"rows of {longest} tokens are over the model's context of {context}: lower --max-length or --new-tokens"
        )
    loaded.add_adapter("bench", LoraConfig(r=rank, alpha=2 * rank, target_modules=parse_targets(targets)))
    loaded.checkpoint = checkpoint
    limit = gemm_speed(loaded)
    note(f"matrix products: {limit / 1e9:,.0f} GFLOP/s; measuring each for {seconds:g} s, and at least three runs")
    decoded = decoding(loaded, new_tokens, seconds)  # before training, which takes the most memory
    results = [training(loaded, batch_size, max_length, seconds, limit), decoded]
    if as_json:
        rows = [asdict(result) | {"tokens_per_second": result.tokens_per_second} for result in results]
        about = {"model": model, "device": loaded.device, "dtype": dtype, "rank": rank, "targets": targets}
        about |= {"threads": thread_count()} if loaded.device == "cpu" else {}
        print_json(about | {"gemm_flops_per_second": limit, "results": rows})
        return
    parameters = sum(parameter.size for _, parameter in loaded.network.named_parameters())
    where = f"the CPU (threads: {thread_count()})" if loaded.device == "cpu" else loaded.device
    say(f"{model}, {parameters:,} parameters in {dtype}, on {where}; LoRA of rank {rank} on {targets}")
    table = []
    for result in results:
        near = f"{result.gemm_share:.0%} of matrix products" if result.gemm_share is not None else ""
        if result.read_bytes_per_second is not None:
            near = f"{bytes_text(int(result.read_bytes_per_second))}/s of weights read"
        speed = f"{result.tokens_per_second:,.1f}"
        table.append([result.what, f"{result.seconds:.3f}", speed, near, bytes_text(result.peak_bytes)])
    print_table(["", "seconds>", "tokens/s>", "near the limit>", "peak memory>"], table)


def gemm_speed(model: Model) -> float:
    """Floating-point operations a second in products of the size of a model's, in the dtype that it computes in."""
    from ..backend import cast, matmul, to_device, to_numpy

    values = np.random.default_rng(0).random((GEMM_SIZE, GEMM_SIZE), np.float32)
    a = to_device(cast(values, model.dtype), model.device)
    return 2 * GEMM_SIZE**3 / median(timed(lambda: to_numpy(matmul(a, a)[0, 0]), GEMM_SECONDS))


def training(model: Model, batch: int, length: int, seconds: float, limit: float) -> Result:
    from ..optim import AdamW
    from ..step import TrainStep

    step = TrainStep(model, AdamW(model.adapter_parameters("bench"), lr=1e-4))
    tokens = random_tokens(model, batch, length)
    middle = median(timed(lambda: float(step(tokens)), seconds))
    operations = step_operations(model, batch, length)
    what = f"training, {batch} × {length}" + (", checkpointing" if model.checkpoint else "")
    return Result(what, batch * length, middle, peak_bytes(model.device), gemm_share=operations / middle / limit)


def decoding(model: Model, count: int, seconds: float) -> Result:
    prompt = random_tokens(model, 1, PROMPT_LENGTH)[0].tolist()
    runs = timed(lambda: model.generate(prompt, max_new_tokens=count, stop=[]), seconds)
    middle = median(runs)
    what = f"decoding {count} tokens after {PROMPT_LENGTH}, with the adapter"
    read = bytes_read(model) * count / middle
    return Result(what, count, middle, peak_bytes(model.device), read_bytes_per_second=read)


def bytes_read(model: Model) -> int:
    """Bytes of weights that a token takes: all of them, but of an embedding that is not the head's too a single row."""
    from ..nn import Embedding

    modules = [module for _, module in model.network.named_modules() if isinstance(module, Embedding)]
    looked_up = {id(module.weight) for module in modules} - {id(model.network.lm_head.weight)}
    parameters = [parameter for _, parameter in model.network.named_parameters()]
    return sum(parameter.data.nbytes for parameter in parameters if id(parameter) not in looked_up)


def step_operations(model: Model, batch: int, length: int) -> float:
    """Operations that a step cannot leave out: products with the frozen weights, forward and for dx, and attention.

    Two for each weight and token forward, two backward; the first layer's dx is counted too. Causal attention: two
    products forward and four backward over half of the scores. Recomputation is not counted: it is what one pays.
    """
    from ..nn import Linear

    weights = sum(
        module.in_features * module.out_features
        for _, module in model.network.named_modules()
        if isinstance(module, Linear)
    )
    config = model.config
    scores = config.num_hidden_layers * config.num_attention_heads * config.head_dim * length**2 / 2
    return batch * (4 * weights * length + 2 * 6 * scores)


def random_tokens(model: Model, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.config.vocab_size, shape)


def timed(run: Callable[[], object], seconds: float) -> list[float]:
    """The seconds of each run, after one that does not count: as many as fit `seconds`, at least two."""
    run()
    found: list[float] = []
    while len(found) < 2 or sum(found) < seconds:
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return found


def peak_bytes(device: str) -> int:
    """The most memory so far: the process's on the CPU, the pool's on a GPU."""
    from ..memory import memory_bytes, peak_memory_bytes

    return memory_bytes(device) if device.startswith("cuda") else peak_memory_bytes()
