"""Adapters on embeddings: what they compute, what they cost, how they start."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import minilora as ml
from minilora.errors import MiniloraError
from minilora.tensor import observe
from minilora.train.checks import check_first_gradients, pairs_that_start_at_zero
from tests import tiny
from tests.train import made

EMBEDDING = ml.LoraConfig(r=3, alpha=5, target_modules=["embed_tokens"])
A, B = (f"base_model.model.model.embed_tokens.lora_embedding_{factor}" for factor in "AB")


@pytest.mark.parametrize("weight", [1.0, -0.5])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_row_of_a_token_gets_s_times_B_and_its_column_of_A(dtype, weight):
    model = tiny.model(dtype)
    tiny.add_random_adapter(model, "a", EMBEDDING)
    model.set_adapter({"a": weight})
    tokens = tiny.tokens(2, 5)
    found = model.network.model.embed_tokens(tokens).data
    table = ml.to_numpy(model.network.model.embed_tokens.weight.data).astype(np.float64)
    lora_A, lora_B = (model.adapter_parameters("a")[key].data for key in (A, B))
    expected = table[tokens] + weight * (5 / 3) * np.moveaxis(lora_B @ lora_A[:, tokens.reshape(-1)], 0, 1).reshape(
        2, 5, -1
    )
    assert found.dtype == model.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-12 if dtype == "float64" else 1e-5, atol=1e-6)


def test_gradients_reach_the_columns_of_the_batch_s_tokens_alone():
    model = tiny.adapted(EMBEDDING)
    tokens = tiny.tokens(2, 5)
    _, gradients = tiny.gradients(model, tokens)
    columns = np.flatnonzero(np.abs(gradients[A]).sum(axis=0))
    assert set(columns) == set(tokens[:, :-1].reshape(-1))  # the last token of a row predicts nothing


def test_in_training_no_array_of_the_table_s_size_is_made():
    vocabulary, width = 20_000, 64
    embedding = ml.nn.Embedding(ml.Tensor(np.ones((vocabulary, width), np.float32)), np.dtype(np.float32))

    class Network(ml.nn.Module):
        adapter_state = ml.nn.AdapterState()
        dtype = np.dtype(np.float32)

        def __init__(self):
            self.embed_tokens = embedding

    adapters = ml.lora.Adapters(Network())
    adapters.add("a", ml.LoraConfig(r=2, target_modules=["embed_tokens"]))
    adapters.select("a")
    tokens, sizes = tiny.tokens(2, 50), []
    tracemalloc.start()
    with observe(lambda name, outputs, recorded: sizes.extend(output.size for output in outputs)):
        embedding(tokens).sum().backward()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(sizes) < vocabulary * width / 10
    assert peak < vocabulary * width * 4 / 2
    assert adapters.parameters("a")["base_model.model.embed_tokens.lora_embedding_A"].grad.any()


def test_it_starts_with_A_zero_and_B_normal_whatever_the_linear_layers_start_from():
    for init in ("kaiming", "gaussian"):
        model = tiny.model()
        base = model.logits(tiny.tokens())
        model.add_adapter("a", ml.LoraConfig(r=40, target_modules=["embed_tokens", "q_proj"], init=init), seed=1)
        start = {key: tensor.data for key, tensor in model.adapter_parameters("a").items()}
        assert not start[A].any()
        assert start[B].std() == pytest.approx(1.0, rel=0.1)
        assert np.array_equal(model.logits(tiny.tokens()), base)


def test_in_the_first_step_B_has_exactly_no_gradient_and_A_has_one():
    model = made.model(target_modules=["embed_tokens", "q_proj"])
    pairs = pairs_that_start_at_zero(model.parameters())
    assert (B, A) in pairs
    assert len(pairs) == 3
    model.loss(tiny.tokens()).backward()
    assert check_first_gradients(model.parameters(), pairs) == []
    assert not model.parameters()[B].grad.any()
    assert model.parameters()[A].grad.any()


def test_a_gradient_of_B_while_A_is_zero_stops_the_run_by_name():
    model = made.model(target_modules=["embed_tokens", "q_proj"])
    pairs = pairs_that_start_at_zero(model.parameters())
    model.loss(tiny.tokens()).backward()
    model.parameters()[B].grad[1, 1] = 1e-12
    with pytest.raises(
        MiniloraError, match=r"first gradient of .*lora_embedding_B is 1e-12 .* its lora_embedding_A is 0"
    ):
        check_first_gradients(model.parameters(), pairs)


def test_an_embedding_that_learns_nothing_is_named(monkeypatch, capsys):
    gradients = ml.TrainStep.gradients

    def spoiled(step, batches):
        loss = gradients(step, batches)
        step.optimiser.parameters[A].grad[...] = 0
        return loss

    monkeypatch.setattr(ml.TrainStep, "gradients", spoiled)
    made.train(made.model(target_modules=["embed_tokens", "q_proj"]), steps=1)
    assert "1 of 3 lora_embedding_A or lora_B is all zero" in capsys.readouterr().err


def test_all_linear_leaves_embeddings_out():
    for network in (tiny.model(), ml.new_model(tiny.gpt2())):
        network.add_adapter("a", ml.LoraConfig())
        assert not any("embedding" in key or "lm_head" in key for key in network.adapter_parameters("a"))


def test_dropout_is_not_applied_to_tokens():
    model = tiny.adapted(ml.LoraConfig(r=3, alpha=5, dropout=0.5, target_modules=["embed_tokens"]))
    assert float(model.loss(tiny.tokens())) == float(model.loss(tiny.tokens()))


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"variant": "lora_fa"}, {"init": "pissa"}])
def test_variants_that_are_not_for_embeddings_are_refused_by_name(fields):
    model = tiny.model()
    with pytest.raises(MiniloraError, match=f"model.embed_tokens is an embedding.*{next(iter(fields))}"):
        model.add_adapter("a", ml.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], **fields))
    assert not model.adapters


def test_each_row_may_have_another_table_of_positions():
    """Positions are shared by the rows of a batch; an adapter of them is not."""
    model = ml.new_model(tiny.gpt2(), dtype="float64", std=0.3)
    lora = ml.LoraConfig(r=2, alpha=4, target_modules=["wpe", "c_attn"])
    for seed, name in enumerate("ab"):
        tiny.add_random_adapter(model, name, lora, seed)
    tokens = np.repeat(tiny.tokens(1, 6), 3, axis=0)
    model.set_adapter(rows=["a", None, "b"])
    found = model.logits(tokens)
    for row, name in enumerate(["a", None, "b"]):
        model.set_adapter(name)
        assert tiny.relative_error(found[row], model.logits(tokens[:1])[0]) < 1e-12


def test_with_several_selected_its_tensors_have_the_names_of_peft_s_memory():
    model = tiny.model()
    for name in "ab":
        tiny.add_random_adapter(model, name, ml.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]))
    model.set_adapter({"a": 0.5, "b": 0.5})
    prefix = "base_model.model."
    assert {f"{prefix}model.embed_tokens.lora_embedding_A.a", f"{prefix}lm_head.lora_B.b.weight"} <= set(
        model.parameters()
    )
