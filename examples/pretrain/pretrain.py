"""Pretrains the embedded base model from random weights: every parameter, through the same autograd as an adapter.

    python examples/pretrain/pretrain.py DATA --out OUT --device cuda --minutes 10

DATA is the folder that corpus.py wrote. OUT/model is the result, a Hugging Face directory in float16; OUT/log.jsonl
has a line per report and OUT/checkpoint the model as of the last one. A Llama of 2.8 million parameters: what a
practical model has (rotary positions, grouped queries, SwiGLU, a head tied to the embedding), only less of it.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minilora import AdamW, TrainStep, load_model, no_grad
from minilora.formats.tokenizer import Tokenizer
from minilora.loading import new_model
from minilora.model import Model
from minilora.optim import clip_grad_norm, schedule
from minilora.step import MicroBatch

LENGTH = 256  # tokens of a row: the model's context
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}
BETAS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.95), 0.1, 1.0
WARMUP, FLOOR = 0.02, 0.02  # the part of the run over which the rate rises, and what is left of it at the end
TICKS = 100_000  # the schedule is read by the part of the run that is done, in so many steps
PROMPTS = ("The old man looked at the sea and", "She opened the door, and", "happiness (noun):", "In the beginning")


def new_network(seed: int, device: str) -> Model:
    """The model with random weights, all of them trained; what adds to the residual stream starts smaller (GPT-2)."""
    model = new_model(CONFIG, seed=seed, device=device)
    model.unfreeze(".*")
    for name, parameter in model.parameters().items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data *= 1 / math.sqrt(2 * CONFIG["num_hidden_layers"])
    return model


def rows(stream: np.ndarray, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Without end: (batch, LENGTH) windows that start anywhere in the stream of documents."""
    random = np.random.default_rng(seed)
    while True:
        starts = random.integers(0, len(stream) - LENGTH + 1, batch)
        yield stream[starts[:, None] + np.arange(LENGTH)].astype(np.int64)


def validation_loss(model: Model, stream: np.ndarray, batch: int) -> float:
    """Mean cross-entropy (nats) per token over the stream, cut into rows of LENGTH."""
    whole = stream[: len(stream) // LENGTH * LENGTH].reshape(-1, LENGTH).astype(np.int64)
    total, count = 0.0, 0
    with no_grad():
        for start in range(0, len(whole), batch):
            part = whole[start : start + batch]
            total += float(model.loss(part, normaliser=1.0).data)
            count += part.size - len(part)
    return total / count


def samples(model: Model) -> list[str]:
    return [prompt + model.generate(prompt, 40, temperature=0.8, top_p=0.95, seed=1) for prompt in PROMPTS]


def save(model: Model, path: Path, dtype: type) -> None:
    """The model as a Hugging Face directory with its weights in `dtype`; the model itself stays as it is."""
    kept = {name: parameter.data for name, parameter in model.network.named_parameters()}
    try:
        for _, parameter in model.network.named_parameters():
            parameter.data = parameter.data.astype(dtype)
        model.save(path)
    finally:
        for name, parameter in model.network.named_parameters():
            parameter.data = kept[name]


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the embedded base model.")
    parser.add_argument("data", type=Path, help="the folder that corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="go on from this model instead of random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, help="train for so long; without it, for --steps")
    parser.add_argument("--steps", type=int, default=16_000, help="at most so many optimiser steps")
    parser.add_argument("--batch", type=int, default=128, help="rows of 256 tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--every", type=int, default=1000, help="steps between two reports")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    tokens = np.load(arguments.data / "tokens.npz")
    train, valid = tokens["train"], tokens["valid"]
    if arguments.start is None:
        model = new_network(arguments.seed, arguments.device)
    else:
        model = load_model(arguments.start, arguments.device, "float32")
        model.unfreeze(".*")
    model.tokenizer = tokenizer_of(arguments.data)
    parameters = model.parameters()
    decayed = {name: tensor for name, tensor in parameters.items() if len(tensor.shape) > 1}
    others = {name: tensor for name, tensor in parameters.items() if name not in decayed}
    optimisers = [
        AdamW(decayed, arguments.lr, BETAS, weight_decay=WEIGHT_DECAY),
        AdamW(others, arguments.lr, BETAS, weight_decay=0.0),
    ]
    passes = TrainStep(model, AdamW(parameters))  # of which only the gradients are used: there are two optimisers
    factor = schedule("cosine", TICKS, warmup=round(WARMUP * TICKS), floor=FLOOR)
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = (arguments.out / "log.jsonl").open("w", encoding="utf-8")
    size = sum(tensor.size for tensor in parameters.values())
    print(f"{size:,} parameters, {len(train):,} training tokens, {len(valid):,} for validation", flush=True)

    begun, recent, step, done = time.monotonic(), [], 0, 0.0
    batches = rows(train, arguments.batch, arguments.seed)
    while done < 1:
        loss = passes.gradients([MicroBatch(next(batches))])  # on a GPU: one launch of a recorded step
        clip_grad_norm(parameters, MAX_NORM)
        for optimiser in optimisers:
            optimiser.lr = arguments.lr * factor(int(done * TICKS))
            optimiser.step()
        step += 1
        recent.append(loss)
        seconds = time.monotonic() - begun
        done = max(step / arguments.steps, seconds / (60 * arguments.minutes) if arguments.minutes else 0.0)
        if step in (1, 10, 100) or step % arguments.every == 0 or done >= 1:
            report = {
                "step": step,
                "tokens": step * arguments.batch * LENGTH,
                "seconds": round(time.monotonic() - begun, 1),
                "lr": optimisers[0].lr,
                "loss": sum(map(float, recent)) / len(recent),
                "validation_loss": validation_loss(model, valid, arguments.batch),
                "samples": samples(model),
            }
            if not math.isfinite(report["loss"]):
                raise SystemExit(f"error: the loss is {report['loss']} at step {step}: lower --lr")
            recent.clear()
            log.write(json.dumps(report) + "\n")
            log.flush()
            print(
                f"step {step:,}  {report['tokens'] / 1e6:,.1f}M tokens  {report['seconds']:,.0f} s  "
                f"loss {report['loss']:.4f}  validation {report['validation_loss']:.4f}",
                *report["samples"],
                sep="\n    ",
                flush=True,
            )
            save(model, arguments.out / "checkpoint", np.float32)
    save(model, arguments.out / "model", np.float16)
    log.close()
    loss_in_float16 = validation_loss(load_model(arguments.out / "model", arguments.device), valid, arguments.batch)
    print(f"{arguments.out / 'model'}: float16, validation loss {loss_in_float16:.4f}")


def tokenizer_of(data: Path) -> Tokenizer:
    """The tokenizer that corpus.py made, with the settings that a Hugging Face directory has beside it."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "model_max_length": LENGTH,
        "clean_up_tokenization_spaces": False,
    }
    path = data / "tokenizer_config.json"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    found = Tokenizer.from_directory(data)
    if found is None:
        raise SystemExit(f"error: {data} has no tokenizer.json: run corpus.py first")
    return found


if __name__ == "__main__":
    main()
