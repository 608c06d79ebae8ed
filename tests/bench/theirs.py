"""The side of torch + transformers + PEFT: each function makes a job ready and returns what is timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from .common import ALPHA, LEARNING_RATE, PROMPT_LENGTH, RANK, Job, labels_of, model_directory, random_B, random_tokens


def base(attention: str = "sdpa") -> Any:
    return AutoModelForCausalLM.from_pretrained(model_directory(), dtype=torch.float32, attn_implementation=attention)


def with_adapters(
    *names: str, linears: str | Sequence[str] = "all-linear", trained: bool = True, attention: str = "sdpa"
) -> Any:
    model = base(attention)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=linears, task_type="CAUSAL_LM")
    for number, name in enumerate(names):
        model = get_peft_model(model, config, adapter_name=name) if number == 0 else model
        if number:
            model.add_adapter(name, config)
    for key, parameter in model.named_parameters():
        if trained and "lora_B" in key:
            parameter.data[...] = torch.from_numpy(random_B(key, tuple(parameter.shape)))
    return model


def train(
    batch: int,
    length: int,
    linears: str | Sequence[str] = "all-linear",
    labelled: float = 1.0,
    checkpoint: bool = False,
    attention: str = "sdpa",
) -> Job:
    model = with_adapters("a", linears=linears, trained=False, attention=attention)
    model.train()
    if checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        model.config.use_cache = False
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    tokens = random_tokens(batch, length)
    labels = torch.from_numpy(labels_of(tokens, labelled))
    tokens = torch.from_numpy(tokens)

    def step() -> float:
        optimiser.zero_grad()
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimiser.step()
        return loss.item()

    return Job(step)


def generation(model: Any, prompt_length: int, new_tokens: int) -> Job:
    model.eval()
    prompt = torch.from_numpy(random_tokens(1, prompt_length))
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}
    mask = torch.ones_like(prompt)

    def run() -> None:
        with torch.inference_mode():
            model.generate(input_ids=prompt, attention_mask=mask, **options)

    return Job(run)


def decode(adapter: bool) -> Job:
    return generation(with_adapters("a") if adapter else base(), PROMPT_LENGTH, 128)


def prefill() -> Job:
    return generation(with_adapters("a"), 512, 1)


def load(source: str) -> Job:
    held = []
    return Job(lambda: held.append(base()))


def switch() -> Job:
    model = with_adapters("a", "b")
    names = iter(["a", "b"] * 1000)
    return Job(lambda: model.set_adapter(next(names)))


def merge() -> Job:
    model = with_adapters("a")
    model.base_model.merge_adapter()
    return Job(model.base_model.merge_adapter, before=model.base_model.unmerge_adapter)
