"""minilora's side of the cases: each function makes a job ready and returns what is timed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import minilora as ml
from minilora.generate import generate_batch

from .common import ALPHA, LEARNING_RATE, PROMPT_LENGTH, RANK, Job, labels_of, model_directory, random_B, random_tokens


def with_adapters(*names: str, linears: str | Sequence[str] = "all-linear", trained: bool = True) -> ml.Model:
    """The model with random adapters; `trained` ones have a B that is not zero, as after training."""
    model = ml.load_model(model_directory())
    for seed, name in enumerate(names):
        model.add_adapter(name, ml.LoraConfig(r=RANK, alpha=ALPHA, target_modules=linears), seed=seed)
        for key, tensor in model.adapter_parameters(name).items():
            if trained and "lora_B" in key:
                tensor.data[...] = random_B(key, tensor.shape)
    return model


def train(
    batch: int,
    length: int,
    linears: str | Sequence[str] = "all-linear",
    labelled: float = 1.0,
    checkpoint: bool = False,
) -> Job:
    model = with_adapters("a", linears=linears, trained=False)
    model.checkpoint = checkpoint
    step = ml.TrainStep(model, ml.AdamW(model.adapter_parameters("a"), lr=LEARNING_RATE))
    tokens = random_tokens(batch, length)
    labels = labels_of(tokens, labelled)
    return Job(lambda: float(step(tokens, labels)))


def decode(adapter: bool) -> Job:
    model = with_adapters(*["a"] * adapter)
    prompt = random_tokens(PROMPT_LENGTH).tolist()
    return Job(lambda: model.generate(prompt, max_new_tokens=128, stop=[]))


def prefill() -> Job:
    model = with_adapters("a")
    prompt = random_tokens(512).tolist()
    return Job(lambda: model.generate(prompt, max_new_tokens=1, stop=[]))


def mixed(mixed: bool) -> Job:
    model = with_adapters("a", "b", "c", "d")
    model.set_adapter(rows=["a", "b", "c", "d"] * 2) if mixed else model.set_adapter("a")
    tokens = random_tokens(8, 128)
    return Job(lambda: model.logits(tokens))


def mixed_decode(mixed: bool) -> Job:
    model = with_adapters("a", "b", "c", "d")
    model.set_adapter(rows=["a", "b", "c", "d"] * 2) if mixed else model.set_adapter("a")
    prompts = [row.tolist() for row in random_tokens(8, PROMPT_LENGTH)]
    return Job(lambda: generate_batch(model, prompts, max_new_tokens=32, stop=[]))


def load(source: str) -> Job:
    path = "smollm2" if source == "gguf" else model_directory()
    held = []
    return Job(lambda: held.append(ml.load_model(path)))


def switch() -> Job:
    model = with_adapters("a", "b")
    names = iter(["a", "b"] * 1000)
    return Job(lambda: model.set_adapter(next(names)))


def merge() -> Job:
    model = with_adapters("a")
    model.merge_adapter("a")
    return Job(lambda: model.merge_adapter("a"), before=model.unmerge_adapter)


def help() -> Job:
    return Job(lambda: subprocess.run([sys.executable, "-m", "minilora", "--help"], check=True, capture_output=True))
