"""No gradient of a frozen weight is ever computed, and no frozen weight ever changes.

Three witnesses: every matrix product that is taken, everything that a vjp returns, and the memory that backward takes.
Widths and counts of tokens are chosen so that an array's shape says what it is.
"""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest

import minilora as ml
from minilora import backend
from minilora import tensor as tape
from minilora.backend import to_device
from minilora.tensor import definitions_only, observe
from tests import tiny

TOKENS = 14  # 2 · 7: no width of the network, no rank
CONFIG = ml.LoraConfig(r=3, alpha=6)


class Product(NamedTuple):
    left: tuple[int, ...]
    right: tuple[int, ...]
    result: tuple[int, ...]


@contextmanager
def products(network: ml.Model) -> Iterator[list[Product]]:
    """Every matrix product inside: what NumPy is asked for, or whatever takes them on the network's GPU."""
    on_cpu = network.device == "cpu"
    genuine, seen = np.matmul if on_cpu else backend.gpu_products[-1], []

    def spy(a: Any, b: Any, *out: Any, **options: Any) -> Any:
        result = genuine(a, b, *out, **options)
        seen.append(Product(a.shape, b.shape, result.shape))
        return result

    with pytest.MonkeyPatch.context() as patch:
        if on_cpu:
            patch.setattr(np, "matmul", spy)
        else:
            patch.setattr(backend, "gpu_products", [spy])
        yield seen


@contextmanager
def vjp_results(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """The name of each primitive that backward visits, with the shape of each gradient that its vjp returns."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    genuine = tape.Node.__init__

    def watched(node: Any, name: str, vjp: Any, *rest: Any) -> None:
        def spy(*grads: Any) -> Any:
            results = vjp(*grads)
            seen.extend(
                (name, r.shape) for r in (results if isinstance(results, tuple) else (results,)) if r is not None
            )
            return results

        genuine(node, name, spy, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(tape.Node, "__init__", watched)
        yield seen


def frozen_shapes(network: ml.Model) -> set[tuple[int, ...]]:
    """The shapes of all frozen matrices, and of their transposes."""
    shapes = {p.shape for _, p in network.network.named_parameters() if p.ndim == 2 and not p.requires_grad}
    return shapes | {shape[::-1] for shape in shapes}


def gradients_of_weights(network: ml.Model, taken: list[Product]) -> list[Product]:
    """Products whose result has a frozen matrix's shape, also in a stack of them."""
    return [product for product in taken if product.result[-2:] in frozen_shapes(network)]


WAYS = ["one adapter", "weighted sum", "rows", "dropout", "head", "some layers", "checkpoint", "trained bias"]


def prepared(way: str, device: str) -> ml.Model:
    """A network with its adapters selected in one of the ways that a training pass can run."""
    config = {
        "dropout": ml.LoraConfig(r=3, dropout=0.3),
        "head": ml.LoraConfig(r=3, target_modules=["lm_head", "v_proj"]),
        "some layers": ml.LoraConfig(r=3, target_modules=["o_proj", "gate_proj"]),
    }.get(way, CONFIG)
    network = tiny.adapted(config, attention_bias=True)
    tiny.add_random_adapter(network, "b", config, seed=1)
    network.set_adapter("a")
    if way == "weighted sum":
        network.set_adapter({"a": 0.7, "b": 0.3})
    elif way == "rows":
        network.set_adapter(rows=["b", "a"])
    elif way == "checkpoint":
        network.checkpoint = True
    elif way == "trained bias":
        network.unfreeze(["q_proj.bias", "input_layernorm.weight"])
    return network.to(device)


@pytest.mark.parametrize("way", WAYS)
def test_no_product_has_the_shape_of_a_frozen_weight(way, device):
    """Forward and backward of the definitions: ∂L/∂W = gᵀ x would be one."""
    network = prepared(way, device)
    with definitions_only(), products(network) as taken:
        network.loss(tiny.tokens()).backward()
    assert len(taken) > 40
    assert gradients_of_weights(network, taken) == []


@pytest.mark.parametrize("way", WAYS)
def test_kernels_take_no_product_over_the_tokens_that_has_the_shape_of_a_frozen_weight(way):
    """A kernel may form s B A, whose inner dimension is the rank; gᵀ x has the tokens there."""
    network = prepared(way, "cpu")
    with products(network) as taken:
        network.loss(tiny.tokens()).backward()
    assert [product for product in gradients_of_weights(network, taken) if product.left[-1] != CONFIG.r] == []


def test_the_gradient_of_an_unfrozen_weight_is_seen(device):
    """So the watch is awake: training one matrix takes one product of its shape, over the tokens."""
    network = prepared("one adapter", device)
    shapes = frozen_shapes(network)
    name = "model.layers.1.mlp.down_proj.weight"
    network.unfreeze([name])
    with definitions_only(), products(network) as taken:
        network.loss(tiny.tokens()).backward()
    seen = [(product.result, product.left[-1]) for product in taken if product.result in shapes]
    assert seen == [((24, 40), TOKENS)]


@pytest.mark.parametrize("way", WAYS)
def test_no_vjp_returns_an_array_of_a_frozen_weight_s_shape(way, device, monkeypatch):
    network = prepared(way, device)
    with vjp_results(monkeypatch) as results:
        network.loss(tiny.tokens()).backward()
    assert len(results) > 20
    assert [result for result in results if result[1] in frozen_shapes(network)] == []


@pytest.mark.parametrize("kernels", [nullcontext, definitions_only])
@pytest.mark.parametrize("way", ["one adapter", "rows", "checkpoint"])
def test_backward_takes_less_memory_than_the_smallest_frozen_weight(way, kernels):
    """Whatever it is computed with: three tokens on wide layers, so that one weight would outweigh all the rest."""
    network = tiny.model(hidden_size=256, intermediate_size=512, num_hidden_layers=1, head_dim=64)
    network.add_adapter("a", ml.LoraConfig(r=1, target_modules=["q_proj", "k_proj", "up_proj", "down_proj"]))
    if way == "rows":
        network.set_adapter(rows=["a"])
    network.checkpoint = way == "checkpoint"
    matrices = [p.data.nbytes for name, p in network.network.named_parameters() if "proj" in name]
    with kernels():
        loss = network.loss(tiny.tokens(1, 3))
        tracemalloc.start()
        try:
            loss.backward()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert network.adapter_parameters("a")["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"].grad is not None
    assert peak < min(matrices)


@pytest.mark.parametrize("way", WAYS)
def test_frozen_weights_have_the_same_bits_after_training(way, device):
    network = prepared(way, device)
    trained = network.parameters()
    frozen = {name: p for name, p in network.network.named_parameters() if not p.requires_grad}
    before, arrays = hashes(frozen), {name: parameter.data for name, parameter in frozen.items()}
    start = hashes(trained)
    step = ml.TrainStep(network, ml.AdamW(trained, lr=0.05), max_grad_norm=1.0)
    for seed in range(3):
        step(tiny.tokens(seed=seed))
    assert hashes(frozen) == before
    assert all(parameter.data is arrays[name] and parameter.grad is None for name, parameter in frozen.items())
    assert all(now != then for now, then in zip(hashes(trained).values(), start.values(), strict=True))


def hashes(parameters: dict[str, ml.Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(ml.to_numpy(p).tobytes()).hexdigest() for name, p in parameters.items()}


def test_a_mapped_checkpoint_is_trained_on_without_a_change_to_its_file(tmp_path):
    """The base is the file itself, read-only: an adapter is trained over it."""
    tiny.model("bfloat16").save(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    network = ml.load_model(tmp_path)
    assert not network.network.lm_head.weight.data.flags.writeable
    network.add_adapter("a", CONFIG)
    step = ml.TrainStep(network, ml.AdamW(network.parameters(), lr=0.05))
    losses = [float(step(tiny.tokens())) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


# --- nothing below the first trained layer ----------------------------------------------------------------------------


def recorded(network: ml.Model) -> list[tuple[str, bool]]:
    calls: list[tuple[str, bool]] = []
    with observe(lambda name, outputs, recorded: calls.append((name, recorded))):
        network.loss(tiny.tokens())
    return calls


@pytest.mark.parametrize("layer", [0, 1])
def test_nothing_is_recorded_below_the_first_adapted_layer(layer):
    network = tiny.adapted(ml.LoraConfig(r=3, target_modules=["up_proj"], layers_to_transform=[layer]))
    calls = recorded(network)
    first = next(index for index, (_, noted) in enumerate(calls) if noted)
    assert calls[first][0] in ("lora_linear", "lora_linears")
    assert [name for name, _ in calls[:first]].count("attention") == layer + 1  # it is the layer's MLP
    # Above it: the branch is recorded whole, the residual stream from where the branch joins it.
    assert [name for name, noted in calls[first + 1 :] if not noted] == []


def test_a_base_without_adapters_records_nothing():
    network = tiny.adapted()
    network.set_adapter(None)
    assert not any(noted for _, noted in recorded(network))
    assert not network.loss(tiny.tokens()).requires_grad


def test_the_first_adapted_layer_computes_no_gradient_of_its_input(device):
    """dx = g W + v A is only taken where something below is trained: here that is nothing, whatever the layer is."""
    network = tiny.adapted(ml.LoraConfig(r=3, target_modules=["q_proj"]), num_hidden_layers=1).to(device)
    with definitions_only():
        loss = network.loss(tiny.tokens())
        with products(network) as taken:
            loss.backward()
    assert (32, 24) not in [product.right for product in taken]  # W of q_proj
    assert (3, 24) not in [product.right for product in taken]  # and its A
    assert [product.result for product in taken if product.result == (3, 24)] == [(3, 24)]  # but dA


def test_a_frozen_adapter_gets_no_gradient_and_passes_it_on(device):
    """trainable=False: its products with A and B are part of the function, and nothing of their shape is formed."""
    network = prepared("one adapter", device)
    for key, parameter in network.adapter_parameters("a").items():
        parameter.requires_grad = ".layers.0.self_attn.q_proj" in key
    trained = network.parameters()
    assert len(trained) == 2
    with definitions_only(), products(network) as taken:
        _, gradients = tiny.gradients(network, tiny.tokens())
    ranks = [p.result for p in taken if 3 in p.result and p.left[-1] == TOKENS]
    assert sorted(ranks) == [(3, 24), (32, 3)]  # dA and dB of the one layer
    reference = prepared("one adapter", device)
    _, expected = tiny.gradients(reference, tiny.tokens())
    for key, gradient in gradients.items():
        assert tiny.relative_error(gradient, expected[key]) < 1e-13


def test_a_product_on_the_device_is_watched(device):
    """So that none escapes the watch on a GPU."""
    network = prepared("one adapter", device)
    x = to_device(np.ones((2, 3)), device)
    with products(network) as taken:
        ml.ops.matmul(ml.Tensor(x), ml.Tensor(x.T))
    assert taken == [Product((2, 3), (3, 2), (2, 2))]
