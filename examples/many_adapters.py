"""Three adapters trained at once on one frozen base, and the proof that each trained as it would have alone.

A tiny random Llama in float64, three adapters of different rank, scale, layers, learning rate, clipping and dropout.
Each batch has rows of all three, mixed and in changing numbers; now and then one of them is absent. One pass over the
frozen weights serves all rows. Then each adapter is trained again, alone, on its own rows: the numbers are the same.

python examples/many_adapters.py    (a few seconds)
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

import minilora as ml

CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_act": "silu", "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ADAPTERS = {
    "law": ml.LoraConfig(r=2, alpha=4, target_modules=["q_proj", "v_proj"]),
    "code": ml.LoraConfig(r=8, alpha=8, dropout=0.2),
    "chat": ml.LoraConfig(r=4, alpha=16, use_rslora=True, target_modules=["up_proj", "down_proj", "lm_head"]),
}
LEARNING_RATES = {"law": 2e-2, "code": 5e-3, "chat": 1e-2}
CLIPS = {"law": 1.0, "code": 0.5, "chat": None}
STEPS = 40


def base_with(names: Iterable[str]) -> ml.Model:
    """The base, the same one every time, with these adapters on it."""
    model = ml.new_model(CONFIG, seed=0, dtype="float64", std=0.2)
    for name in names:
        model.add_adapter(name, ADAPTERS[name], seed=len(name))
    return model


def optimiser_of(model: ml.Model, name: str) -> ml.AdamW:
    return ml.AdamW(model.adapter_parameters(name), lr=LEARNING_RATES[name])


def batches() -> Iterator[tuple[np.ndarray, list[str]]]:
    """(tokens, the adapter of each row) of every step. Each adapter's texts repeat its own eight tokens."""
    random = np.random.default_rng(0)
    for number in range(STEPS):
        present = [name for index, name in enumerate(ADAPTERS) if (number + index) % 5]  # one is absent now and then
        rows = [str(name) for name in random.choice(present, 6)]
        starts = {name: 8 * index for index, name in enumerate(ADAPTERS)}
        yield np.stack([starts[name] + random.integers(0, 8) + np.arange(12) % 4 for name in rows]), rows


def train_together() -> tuple[dict[str, list[float]], ml.Model]:
    """All three in one run: {name: its losses}, and the model."""
    model = base_with(ADAPTERS)
    step = ml.TrainStep(model, {name: optimiser_of(model, name) for name in ADAPTERS}, max_grad_norm=CLIPS)
    losses: dict[str, list[float]] = {name: [] for name in ADAPTERS}
    for tokens, rows in batches():
        for name, loss in step(tokens, rows=rows).items():
            losses[name].append(float(loss))
    return losses, model


def train_alone(name: str) -> tuple[list[float], ml.Model]:
    """One of them in a run of its own, on its own rows of the same batches."""
    model = base_with([name])
    step = ml.TrainStep(model, optimiser_of(model, name), max_grad_norm=CLIPS[name])
    mine = [(tokens, [row for row, owner in enumerate(rows) if owner == name]) for tokens, rows in batches()]
    return [float(step(tokens[own])) for tokens, own in mine if own], model


def difference(found: Mapping[str, ml.Tensor], expected: Mapping[str, ml.Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ over all of an adapter's matrices together."""
    pairs = [(found[key].data - tensor.data, tensor.data) for key, tensor in expected.items()]
    return float(np.sqrt(sum((d**2).sum() for d, _ in pairs) / sum((e**2).sum() for _, e in pairs)))


together, model = train_together()
print(f"{STEPS} batches with rows of {len(ADAPTERS)} adapters, one pass over the frozen weights for each batch\n")
print("adapter   steps   first loss   last loss   last loss alone   ‖A, B − A, B alone‖ / ‖A, B‖")
differences = {}
for name in ADAPTERS:
    alone, own_model = train_alone(name)
    differences[name] = difference(model.adapter_parameters(name), own_model.adapter_parameters(name))
    first, last = together[name][0], together[name][-1]
    print(f"{name:8} {len(alone):6} {first:12.6f} {last:11.6f} {alone[-1]:17.6f} {differences[name]:20.1e}")
assert all(value < 1e-12 for value in differences.values()), "an adapter's training depends on its neighbours"
print("\nEach was trained to the digits of a run of its own: what else is in the batch changes nothing.")
