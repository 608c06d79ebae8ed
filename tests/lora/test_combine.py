"""Adapters combined into a new one: what it computes, what it lost, and that no ΔW is ever made for it."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora.errors import MiniloraError
from tests import tiny
from tests.cases.models import architectures, build, lora_configs

ROUNDING = 1e-12
seeds = st.integers(0, 2**16)
weights = st.tuples(st.sampled_from((0.7, 1.0, -2.0)), st.sampled_from((0.3, -1.5)))


def deltas(network: ml.Model, weighted: dict[str, float]) -> dict[str, np.ndarray]:
    """Σ weight · s · B A of each layer, by the definition."""
    found: dict[str, np.ndarray] = {}
    for name, weight in weighted.items():
        for path, layer in network._adapters.layers(name).items():
            update = weight * layer.scale * ml.to_numpy(layer.lora_B) @ ml.to_numpy(layer.lora_A)
            found[path] = found.get(path, 0.0) + update
    return found


@given(architecture=architectures, configs=st.tuples(lora_configs(), lora_configs()), weights=weights, seed=seeds)
def test_cat_is_the_weighted_sum_and_its_ranks_add_up(architecture, configs, weights, seed, device):
    network = build(architecture, dict(zip("ab", configs, strict=True)), device, seed)
    weighted = dict(zip("ab", weights, strict=True))
    ids = tiny.tokens(2, 5, seed)
    network.set_adapter(weighted)
    expected = ml.to_numpy(network.logits(ids))
    report = network.combine_adapters("new", weighted)
    assert network.active_adapters == {"new": 1.0}
    assert tiny.relative_error(network.logits(ids), expected) < ROUNDING
    a, b = ({p: layer.rank for p, layer in network._adapters.layers(n).items()} for n in "ab")
    assert report.ranks == {path: a.get(path, 0) + b.get(path, 0) for path in report.ranks}
    assert report.ranks.keys() == a.keys() | b.keys()
    assert (report.relative_error, set(report.errors.values())) == (0.0, {0.0})
    assert {path: layer.rank for path, layer in network._adapters.layers("new").items()} == report.ranks
    assert all(layer.scale == 1 for layer in network._adapters.layers("new").values())


@given(
    architecture=architectures, configs=st.tuples(lora_configs(), lora_configs()), weights=weights,
    rank=st.sampled_from((1, 2, 4, 100)), seed=seeds,
)  # fmt: skip
def test_svd_is_the_best_approximation_of_its_rank_and_says_how_good(
    architecture, configs, weights, rank, seed, device
):
    """Held to a full SVD of ΔW, which only this test makes: the same matrix, and ‖ΔW' − ΔW‖ as reported."""
    network = build(architecture, dict(zip("ab", configs, strict=True)), device, seed)
    weighted = dict(zip("ab", weights, strict=True))
    report = network.combine_adapters("new", weighted, combination="svd", rank=rank)
    found, whole, lost = deltas(network, {"new": 1.0}), 0.0, 0.0
    for path, delta in deltas(network, weighted).items():
        U, sigma, V = np.linalg.svd(delta, full_matrices=False)
        best = (U[:, :rank] * sigma[:rank]) @ V[:rank]
        scale = np.linalg.norm(delta)
        assert np.linalg.norm(found[path] - best) / scale < 1e-10
        assert report.errors[path] == pytest.approx(np.linalg.norm(best - delta) / scale, abs=1e-9)
        assert network._adapters.layers("new")[path].rank <= rank
        whole, lost = whole + scale**2, lost + np.linalg.norm(best - delta) ** 2
    assert report.relative_error == pytest.approx(np.sqrt(lost / whole), abs=1e-9)
    if rank == 100:
        assert report.relative_error == 0


def test_without_a_rank_svd_takes_the_largest_of_each_layer():
    network = tiny.model()
    tiny.add_random_adapter(network, "a", ml.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    tiny.add_random_adapter(network, "b", ml.LoraConfig(r=5, target_modules=["q_proj", "v_proj"]), seed=1)
    ranks = network.combine_adapters("new", {"a": 1, "b": 1}, "svd").ranks
    assert {path.rpartition(".")[2]: rank for path, rank in ranks.items()} == {"q_proj": 5, "v_proj": 5, "up_proj": 2}


def test_both_factors_of_an_svd_have_one_size():
    """Training goes on from it: B as large as A, not all of σ in one of them."""
    network = tiny.adapted(ml.LoraConfig(r=4, alpha=400))
    network.combine_adapters("new", {"a": 1.0}, "svd", rank=3)
    for layer in network._adapters.layers("new").values():
        assert np.linalg.norm(layer.lora_A.data) == pytest.approx(np.linalg.norm(layer.lora_B.data))


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_no_update_is_ever_made_whole(combination):
    """What it takes is far below one ΔW of the wide layers, in float64."""
    network = tiny.model("float32", hidden_size=512, intermediate_size=1024, num_hidden_layers=1, head_dim=128)
    for name in "ab":
        tiny.add_random_adapter(network, name, ml.LoraConfig(r=2, target_modules=["up_proj", "down_proj"]))
    tracemalloc.start()
    try:
        network.combine_adapters("new", {"a": 0.5, "b": 0.5}, combination)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 512 * 1024 * 8 / 8


def test_the_result_is_an_adapter_like_any_other(tmp_path):
    """It is saved and loaded, trained, combined again and deleted; the others stay."""
    network = tiny.model("float32")
    tiny.add_random_adapter(network, "a", ml.LoraConfig(r=2, target_modules=["q_proj", "up_proj", "lm_head"]))
    tiny.add_random_adapter(
        network, "b", ml.LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"], rank_pattern={"1.*q_proj": 5}), 1
    )
    network.combine_adapters("c", {"a": 0.5, "b": -0.5})
    network.combine_adapters("d", {"c": 2.0, "a": 1.0}, "svd", rank=4)
    for name in "cd":
        network.set_adapter(name)
        logits = network.logits(tiny.tokens())
        network.save_adapter(name, tmp_path / name)
        again = tiny.model("float32")
        again.load_adapter("x", tmp_path / name)
        assert np.array_equal(again.logits(tiny.tokens()), logits)
        assert {p: layer.rank for p, layer in again._adapters.layers("x").items()} == {
            p: layer.rank for p, layer in network._adapters.layers(name).items()
        }
    step = ml.TrainStep(network, ml.AdamW(network.parameters(), lr=0.01))
    losses = [float(step(tiny.tokens())) for _ in range(6)]
    assert losses[-1] < losses[0]
    network.delete_adapter("c")
    assert list(network.adapters) == ["a", "b", "d"]


def test_updates_that_cancel_leave_nothing_and_no_error():
    network = tiny.adapted()
    base = tiny.model().logits(tiny.tokens())
    tiny.add_random_adapter(network, "b")
    for key, tensor in network.adapter_parameters("b").items():
        tensor.data[...] = network.adapter_parameters("a")[key].data
    report = network.combine_adapters("none", {"a": 1.0, "b": -1.0}, "svd", rank=2)
    assert tiny.relative_error(network.logits(tiny.tokens()), base) < 1e-12
    assert np.isfinite(report.relative_error)


def test_a_merge_of_the_combination_is_the_merge_of_the_sum():
    network = tiny.adapted()
    tiny.add_random_adapter(network, "b", seed=3)
    network.merge_adapter({"a": 0.7, "b": -0.3})
    expected = network.logits(tiny.tokens())
    network.unmerge_adapter()
    network.combine_adapters("c", {"a": 0.7, "b": -0.3})
    network.merge_adapter("c")
    assert tiny.relative_error(network.logits(tiny.tokens()), expected) < 1e-12


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: m.combine_adapters("a", {"a": 1.0}), "an adapter 'a' already"),
        (lambda m: m.combine_adapters("n", {}), "found nothing to combine"),
        (lambda m: m.combine_adapters("n", {"a": 0.0}), "not all zero"),
        (lambda m: m.combine_adapters("n", {"x": 1.0}), "no adapter 'x'"),
        (lambda m: m.combine_adapters("n", {"a": float("nan")}), "weight of adapter 'a' is nan"),
        (lambda m: m.combine_adapters("n", {"a": 1.0}, "linear"), "combination is 'linear', expected one of cat, svd"),
        (lambda m: m.combine_adapters("n", {"a": 1.0}, rank=3), "ranks add up: leave it out"),
        (lambda m: m.combine_adapters("n", {"a": 1.0}, "svd", rank=0), "rank is 0, expected a whole number"),
        (lambda m: m.combine_adapters("n", {"a": 1.0, "dora": 1.0}), "DoRA adapter's ΔW has full rank"),
        (lambda m: m.combine_adapters("n", {"biased": 1.0}), "parameters of its own .*expected A and B alone"),
    ],
)
def test_what_cannot_be_combined_is_named_and_adds_nothing(act, message):
    network = tiny.model(attention_bias=True)
    network.add_adapter("dora", ml.LoraConfig(use_dora=True))
    network.add_adapter("biased", ml.LoraConfig(bias="lora_only"))
    tiny.add_random_adapter(network, "a")
    with pytest.raises(MiniloraError, match=message):
        act(network)
    assert list(network.adapters) == ["dora", "biased", "a"]
    assert network.active_adapters == {"a": 1.0}
