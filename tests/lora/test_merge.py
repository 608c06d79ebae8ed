"""Merging on whole models: what is rounded and when, what is restored, what is refused, and what is written to disk."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

import minilora as ml
from minilora.errors import MiniloraError
from minilora.kernels.cpu.threads import thread_count
from minilora.tensor import observe
from tests import tiny

CONFIG = ml.LoraConfig(r=3, alpha=5, target_modules=["q_proj", "down_proj"])


def bits(model):
    return {name: ml.to_numpy(p.data).tobytes() for name, p in model.network.named_parameters()}


@pytest.fixture(params=["float64", "float32", "bfloat16", "float16"])
def model(request):
    """A base of each dtype with an adapter."""
    network = tiny.model(request.param)
    tiny.add_random_adapter(network, "a", CONFIG)
    return network


def test_a_merged_weight_is_the_exact_sum_rounded_once(model):
    """Within float32's own rounding: of W + s B A in float64, and for a half-precision base at most one step off it."""
    base = {path: ml.to_numpy(linear.weight.data) for path, linear in model._adapters.linears.items()}
    layers = model._adapters.layers("a")
    model.merge_adapter("a")
    for path, weight in base.items():
        merged = ml.to_numpy(model._adapters.linears[path].weight.data)
        assert merged.dtype == weight.dtype
        if path not in layers:
            assert merged is weight
            continue
        layer = layers[path]
        A, B = (np.asarray(t.data, np.float64) for t in (layer.lora_A, layer.lora_B))
        exact = weight.astype(np.float64) + layer.scale * B @ A
        if weight.dtype in (np.float64, np.float32):
            np.testing.assert_allclose(merged, exact, rtol=0, atol=1e-15 if weight.dtype == np.float64 else 1e-6)
        else:
            assert (merged != exact.astype(np.float32).astype(weight.dtype)).mean() < 0.01  # ties, in float32


def test_merging_deselects_and_a_forward_pass_is_that_of_a_plain_base(model):
    adapted = model.logits(tiny.tokens())
    model.merge_adapter("a")
    assert model.active_adapters == {}
    error = tiny.relative_error(model.logits(tiny.tokens()), adapted)
    precision = {"float64": 1e-13, "float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}
    assert error < precision[model.network.lm_head.weight.dtype.name]
    model.unmerge_adapter()
    model.set_adapter("a")
    assert np.array_equal(model.logits(tiny.tokens()), adapted)


def test_a_thousand_cycles_leave_every_bit_of_the_base(model):
    """Subtracting ΔW again would drift: a bfloat16 weight is off by a hundredth after so many."""
    before = bits(model)
    for _ in range(1000):
        model.merge_adapter({"a": 1.7})
        model.unmerge_adapter()
    assert bits(model) == before
    model.merge_adapter({"a": 1.7})
    assert bits(model) != before


def test_while_it_is_merged_no_adapter_can_be_selected_or_added(model, tmp_path):
    model.merge_adapter("a")
    for action in (
        lambda: model.set_adapter("a"),
        lambda: model.set_adapter(rows=["a", None]),
        lambda: model.add_adapter("b"),
        lambda: model.load_adapter("b", tmp_path),
    ):
        with pytest.raises(MiniloraError, match=r"merged adapter: unmerge_adapter\(\) first"):
            action()
    with pytest.raises(MiniloraError, match="merged already"):
        model.merge_adapter("a")
    model.set_adapter(None)  # which is what is selected
    model.unmerge_adapter()
    with pytest.raises(MiniloraError, match="no adapter is merged"):
        model.unmerge_adapter()
    model.set_adapter("a")


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e5), ("float32", np.inf), ("float32", np.nan)])
def test_a_value_that_is_not_finite_is_refused_and_nothing_is_merged(dtype, value):
    """Found in the last layer: the layers before it are not replaced either."""
    network = tiny.model(dtype)
    tiny.add_random_adapter(network, "a", CONFIG)
    before = bits(network)
    network.adapter_parameters("a")["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].data[0, 0] = value
    with pytest.raises(MiniloraError, match=r"non-finite value into model.layers.1.mlp.down_proj.weight"):
        network.merge_adapter("a")
    assert bits(network) == before
    assert network.active_adapters == {"a": 1.0}


def test_removing_a_merged_adapter_leaves_the_base_restorable():
    network = tiny.model()
    before = bits(network)
    tiny.add_random_adapter(network, "a", CONFIG)
    network.merge_adapter("a")
    network.delete_adapter("a")
    network.unmerge_adapter()
    assert bits(network) == before


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_of_the_head_is_merged_into_the_head_alone(tied):
    """A tied head comes apart: the embedding keeps its weights."""
    network = tiny.model(tie_word_embeddings=tied)
    tiny.add_random_adapter(network, "a", ml.LoraConfig(r=2, target_modules=["lm_head"]))
    adapted, embedding = network.logits(tiny.tokens()), network.network.model.embed_tokens.weight.data.copy()
    assert network.network.head_is_tied == tied
    network.merge_adapter("a")
    assert not network.network.head_is_tied
    assert tiny.relative_error(network.logits(tiny.tokens()), adapted) < 1e-13
    assert np.array_equal(network.network.model.embed_tokens.weight.data, embedding)
    network.unmerge_adapter()
    assert network.network.head_is_tied == tied


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj"]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_merged_model_has_the_same_logits(targets, dtype, tmp_path):
    network = tiny.model(dtype, tie_word_embeddings=True)
    tiny.add_random_adapter(network, "a", ml.LoraConfig(r=2, target_modules=targets))
    network.merge_adapter("a")
    network.save(tmp_path)
    loaded = ml.load_model(tmp_path)
    assert loaded.network.lm_head.weight.dtype.name == dtype
    assert np.array_equal(loaded.logits(tiny.tokens()), network.logits(tiny.tokens()))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["tie_word_embeddings"] == (targets == ["q_proj"])
    assert loaded.adapters == {}


def test_a_model_saved_without_merging_is_the_base(tmp_path):
    """Adapters have files of their own."""
    network = tiny.adapted()
    network.save(tmp_path)
    assert bits(ml.load_model(tmp_path)) == bits(tiny.model())


# --- what a merged model costs ----------------------------------------------------------------------------------------


def calls_of(network, act) -> list[tuple[str, list[tuple[tuple[int, ...], str]]]]:
    """Every primitive that runs inside, with the shapes and dtypes of its results."""
    seen = []
    with observe(lambda name, outputs, recorded: seen.append((name, [(o.shape, o.dtype.name) for o in outputs]))):
        act(network)
    return seen


@pytest.mark.parametrize(
    "act",
    [lambda m: m.logits(tiny.tokens()), lambda m: m.loss(tiny.tokens()), lambda m: m.generate([3, 4], 4, stop=[])],
    ids=["logits", "loss", "generate"],
)
def test_a_merged_model_runs_the_primitives_of_the_bare_base_and_no_other(model, act):
    """So a pass costs exactly what the base's costs; with the adapter beside it, it runs more."""
    with_adapter = calls_of(model, act)
    model.merge_adapter("a")
    merged = calls_of(model, act)
    model.unmerge_adapter()
    model.delete_adapter("a")
    assert merged == calls_of(model, act)
    assert merged == calls_of(tiny.model(model.network.lm_head.weight.dtype.name), act)
    assert merged != with_adapter


@pytest.mark.slow
def test_smollm2_is_merged_within_a_third_of_a_second():
    """Processor time of all threads over the cores, so that other programs' work is not counted; the best of five."""
    try:
        network = ml.load_model("smollm2")
    except MiniloraError as error:
        pytest.skip(str(error))
    tiny.add_random_adapter(network, "a", ml.LoraConfig(r=8, alpha=16))
    seconds = []
    for _ in range(5):
        begun = time.process_time()
        network.merge_adapter("a")
        seconds.append((time.process_time() - begun) / thread_count())
        network.unmerge_adapter()
    assert min(seconds) < 0.3
