"""Many adapters on one base: adding, selecting, removing, initial values, dropout, and one per row in training."""

from __future__ import annotations

import numpy as np
import pytest

import minilora as ml
from minilora.errors import MiniloraError
from minilora.tensor import observe
from tests import tiny

LAYERS = 2 * 7  # linear layers of the tiny network, the head apart


@pytest.fixture
def model():
    return tiny.model()


# --- adding and removing ----------------------------------------------------------------------------------------------


def test_an_adapter_has_two_matrices_for_each_layer_under_peft_s_keys(model):
    model.add_adapter("a", ml.LoraConfig(r=3))
    parameters = model.adapter_parameters("a")
    assert len(parameters) == 2 * LAYERS
    prefix = "base_model.model.model.layers.0.self_attn.k_proj"
    assert parameters[f"{prefix}.lora_A.weight"].shape == (3, 24)
    assert parameters[f"{prefix}.lora_B.weight"].shape == (16, 3)
    assert all(parameter.requires_grad and parameter.dtype == np.float64 for parameter in parameters.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_adapter_is_float32_whatever_the_base_is_stored_in(dtype):
    network = tiny.model(dtype)
    network.add_adapter("a")
    assert {parameter.dtype for parameter in network.adapter_parameters("a").values()} == {np.dtype("float32")}
    loss, gradients = tiny.gradients(network, tiny.tokens())
    assert np.isfinite(loss)
    assert {gradient.dtype for gradient in gradients.values()} == {np.dtype("float32")}


def test_adding_an_adapter_selects_it_and_renames_nothing(model):
    names = [name for name, _ in model.network.named_parameters()]
    arrays = [parameter.data for _, parameter in model.network.named_parameters()]
    model.add_adapter("a")
    assert model.active_adapters == {"a": 1.0}
    assert list(model.adapters) == ["a"]
    assert [name for name, _ in model.network.named_parameters()] == names
    assert all(p.data is array for (_, p), array in zip(model.network.named_parameters(), arrays, strict=True))


def test_removing_the_selected_adapter_leaves_the_bare_base(model):
    base = model.logits(tiny.tokens())
    tiny.add_random_adapter(model, "a")
    tiny.add_random_adapter(model, "b", seed=1)
    with_b = model.logits(tiny.tokens())
    model.delete_adapter("a")  # another than the selected one
    assert np.array_equal(model.logits(tiny.tokens()), with_b)
    model.delete_adapter("b")
    assert np.array_equal(model.logits(tiny.tokens()), base)
    assert model.adapters == {}
    assert all(linear.adapter is None for linear in model._adapters.linears.values())


@pytest.mark.parametrize("chosen", [{"a": 0.5, "b": 0.5}, ["a", "b"]])
def test_removing_one_of_several_selected_leaves_the_bare_base(model, chosen):
    base = model.logits(tiny.tokens())
    for name in "ab":
        tiny.add_random_adapter(model, name)
    if isinstance(chosen, dict):
        model.set_adapter(chosen)
    else:
        model.set_adapter(rows=chosen)
    model.delete_adapter("a")
    assert model.active_adapters == {}
    assert np.array_equal(model.logits(tiny.tokens()), base)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda m: m.add_adapter("a"), "an adapter 'a' already"),
        (lambda m: m.add_adapter("x.y"), "name is 'x.y', expected a text without dots"),
        (lambda m: m.add_adapter(""), "name is ''"),
        (lambda m: m.add_adapter(3), "name is 3"),
        (lambda m: m.set_adapter("c"), "no adapter 'c'; the model has 'a'"),
        (lambda m: m.set_adapter({"a": 1.0, "c": 1.0}), "no adapter 'c'"),
        (lambda m: m.set_adapter({"a": float("nan")}), "weight of adapter 'a' is nan"),
        (lambda m: m.set_adapter({"a": "half"}), "weight of adapter 'a' is 'half', expected a finite number"),
        (lambda m: m.set_adapter(["a"]), r"found \['a'\] for an adapter, expected its name, or {name: weight}"),
        (lambda m: m.merge_adapter(None), "found None for an adapter"),
        (lambda m: m.combine_adapters("c", ["a"]), r"found \['a'\] for an adapter"),
        (lambda m: m.set_adapter(rows="aa"), "rows is 'aa', expected a list with an adapter's name or None"),
        (lambda m: m.set_adapter(rows=[["a"]]), r"rows is \[\['a'\]\], expected a list"),
        (lambda m: m.set_adapter(rows=["a", "c"]), "no adapter 'c'"),
        (lambda m: m.set_adapter("a", rows=["a"]), "found both"),
        (lambda m: m.delete_adapter("c"), "no adapter 'c'"),
        (lambda m: m.adapter_parameters("c"), "no adapter 'c'"),
        (lambda m: m.merge_adapter("c"), "no adapter 'c'"),
        (lambda m: m.merge_adapter({"a": float("inf")}), "weight of adapter 'a' is inf"),
        (lambda m: m.merge_adapter({}), "found no adapter to merge"),
        (lambda m: m.unfreeze("(("), r"unfreeze '\(\(' is not a regular expression"),
        (lambda m: m.unfreeze("nowhere"), "unfreeze 'nowhere' matches no parameter; the model's names end in"),
        (lambda m: m.unfreeze(["norm.weight", "q_pro.weight"]), "'q_pro.weight' .* did you mean 'q_proj.weight'"),
        (lambda m: m.logits([[3, 4], [5]]), "rows of tokens differ in length"),
        (lambda m: m.loss([[3, 4], [5, 6]], labels=[[3], [5, 6]]), "rows of labels differ in length"),
        (lambda m: m.add_adapter("b", ml.LoraConfig(target_modules=["nowhere"])), "'nowhere' matches no linear layer"),
        (lambda m: m.add_adapter("b", ml.LoraConfig(variant="dorra")), "'dorra', expected one of lora, lora_fa"),
        (lambda m: m.add_adapter("b", ml.LoraConfig(r=17, init="pissa")), "takes 17 .*expected a rank of at most 16"),
        (lambda m: m.add_adapter("b", ml.LoraConfig(modules_to_save=["x"])), "'x' matches no module; the model's"),
        (lambda m: m.add_adapter("b", seed=-1), "seed is -1, expected a whole number of at least 0"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(model, action, message):
    tiny.add_random_adapter(model, "a")
    before = model.logits(tiny.tokens())
    with pytest.raises(MiniloraError, match=message):
        action(model)
    assert list(model.adapters) == ["a"]
    assert model.active_adapters == {"a": 1.0}
    assert set(model.parameters()) == set(model.adapter_parameters("a"))
    assert np.array_equal(model.logits(tiny.tokens()), before)


@pytest.mark.parametrize("rows", [["a"], ["a", None, "a"]])
def test_a_batch_with_another_number_of_rows_is_refused(model, rows):
    tiny.add_random_adapter(model, "a")
    model.set_adapter(rows=rows)
    for call in (model.logits, model.loss):
        with pytest.raises(MiniloraError, match=f"names {len(rows)} rows, and the batch has 2"):
            call(tiny.tokens(2))


# --- where training starts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "deviation", "limit"),
    [("kaiming", 1 / np.sqrt(3 * 24), 1 / np.sqrt(24)), ("gaussian", 1 / 200, np.inf), ("zeros", 0, 0)],
)
def test_a_starts_random_and_b_at_zero(model, init, deviation, limit):
    model.add_adapter("a", ml.LoraConfig(r=200, init=init, target_modules=["q_proj"]))
    for key, tensor in model.adapter_parameters("a").items():
        if "lora_B" in key:
            assert not tensor.data.any()
        else:
            assert tensor.data.std() == pytest.approx(deviation, rel=0.05)
            assert np.abs(tensor.data).max() <= limit


def test_the_seed_decides_the_start():
    starts = []
    for seed in (0, 0, 1):
        network = tiny.model()
        network.add_adapter("a", seed=seed)
        starts.append({key: tensor.data.tobytes() for key, tensor in network.adapter_parameters("a").items()})
    assert starts[0] == starts[1] != starts[2]
    drawn = [value for key, value in starts[0].items() if "q_proj.lora_A" in key or "k_proj.lora_A" in key]
    assert len(set(drawn)) == len(drawn)  # layers of one shape do not start alike


def test_at_the_start_a_has_no_gradient_and_b_has_one(model):
    model.add_adapter("a")
    _, gradients = tiny.gradients(model, tiny.tokens())
    assert all(gradient.any() == ("lora_B" in key) for key, gradient in gradients.items())


def test_rank_and_alpha_follow_their_patterns(model):
    config = ml.LoraConfig(
        r=4, alpha=8, target_modules=["q_proj", "up_proj"],
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 2, "up_proj": 8}, alpha_pattern={"up_proj": 40},
    )  # fmt: skip
    model.add_adapter("a", config)
    found = {path: (layer.rank, layer.scale) for path, layer in model._adapters.layers("a").items()}
    assert found == {
        "model.layers.0.self_attn.q_proj": (4, 2.0),
        "model.layers.0.mlp.up_proj": (8, 5.0),
        "model.layers.1.self_attn.q_proj": (2, 4.0),
        "model.layers.1.mlp.up_proj": (8, 5.0),
    }


def test_rslora_divides_alpha_by_the_root_of_the_rank():
    assert ml.LoraConfig(use_rslora=True).scale(16, 8) == 2.0
    assert ml.LoraConfig().scale(16, 8) == 0.5


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def dropping():
    return tiny.adapted(ml.LoraConfig(r=3, dropout=0.4))


def test_every_training_pass_draws_other_masks_and_evaluation_none(dropping):
    tokens = tiny.tokens()
    losses = [float(dropping.loss(tokens)) for _ in range(3)]
    assert len(set(losses)) == 3
    logits = dropping.logits(tokens)
    assert np.array_equal(logits, dropping.logits(tokens))
    with ml.no_grad():
        plain = float(dropping.loss(tokens))
    assert plain not in losses
    for layer in dropping._adapters.layers("a").values():
        layer.dropout = 0.0
    assert np.allclose(dropping.logits(tokens), logits, rtol=1e-12)


def test_a_pass_with_the_same_number_draws_the_same_masks(dropping):
    first = tiny.gradients(dropping, tiny.tokens())
    second = tiny.gradients(dropping, tiny.tokens())
    dropping.training_pass = 0
    again = tiny.gradients(dropping, tiny.tokens())
    assert again[0] == first[0] != second[0]
    assert all(np.array_equal(again[1][key], gradient) for key, gradient in first[1].items())


def test_layers_draw_their_own_masks():
    """Otherwise gate and up, which read the same x, would lose the same entries."""
    network = tiny.adapted(ml.LoraConfig(r=3, dropout=0.5, target_modules=["gate_proj", "up_proj"]))
    zeros = []
    with observe(lambda name, outputs, recorded: zeros.append((outputs[0] == 0).tobytes()) if name == "dropout" else 0):
        network.loss(tiny.tokens())
    assert len(set(zeros)) == len(zeros) == 4


def test_chunks_of_the_head_draw_their_own_masks(monkeypatch):
    monkeypatch.setattr(ml.ops.loss, "CHUNK_ENTRIES", 3 * tiny.VOCABULARY)
    network = tiny.adapted(ml.LoraConfig(r=3, dropout=0.5, target_modules=["lm_head"]))
    zeros = []
    with observe(lambda name, outputs, recorded: zeros.append((outputs[0] == 0).tobytes()) if name == "dropout" else 0):
        network.loss(tiny.tokens())  # 12 labels in 4 chunks
    assert len(set(zeros)) == len(zeros) == 4


# --- backward runs under the adapters of its forward ------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["lm_head", "q_proj"]])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_what_happens_between_forward_and_backward_changes_no_gradient(checkpoint, targets, dropout):
    """An evaluation, another selection: blocks that are run again in backward do not see them."""
    results = []
    for disturbed in (False, True):
        network = tiny.adapted(ml.LoraConfig(r=3, dropout=dropout, target_modules=targets))
        tiny.add_random_adapter(network, "b", seed=5)
        network.set_adapter("a")
        network.checkpoint = checkpoint
        loss = network.loss(tiny.tokens())
        if disturbed:
            network.logits(tiny.tokens(1, 3))
            network.set_adapter("b")
        loss.backward()
        assert all(tensor.grad is None for tensor in network.adapter_parameters("b").values())
        results.append({key: tensor.grad.tobytes() for key, tensor in network.adapter_parameters("a").items()})
    assert results[0] == results[1]


# --- one adapter for each row, in training ----------------------------------------------------------------------------


def rows_model(targets="all-linear"):
    network = tiny.model()
    for seed, name in enumerate("ab"):
        tiny.add_random_adapter(network, name, ml.LoraConfig(r=2 + seed, alpha=4, target_modules=targets), seed)
    return network


ROWS = ["b", None, "a", "b"]


def test_the_loss_of_each_adapter_is_divided_by_its_own_labels():
    network = rows_model()
    tokens, labels = tiny.labelled(4, 8)
    network.set_adapter(rows=ROWS)
    together = float(network.loss(tokens, labels))
    alone = 0.0
    for name in "ab":
        own = [row for row, owner in enumerate(ROWS) if owner == name]
        network.set_adapter(name)
        alone += float(network.loss(tokens[own], labels[own]))
    assert together == pytest.approx(alone, rel=1e-12)


def test_label_counts_are_by_adapter_and_leave_the_bare_base_out():
    network = rows_model()
    tokens, labels = tiny.labelled(4, 8)
    assert network.label_count(tokens, labels) == 6 + 5 + 4 + 3
    network.set_adapter(rows=ROWS)
    assert network.label_count(tokens, labels) == {"b": 6 + 3, "a": 4}
    with pytest.raises(MiniloraError, match="normaliser names a, expected adapter 'b'"):
        network.loss(tokens, labels, normaliser={"a": 4})


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head", "v_proj"]])
def test_a_step_over_micro_batches_of_rows_gives_the_gradients_of_separate_runs(targets):
    """Each adapter's sum over all micro-batches is divided by the adapter's own total, even where one has no label."""
    network = rows_model(targets)
    batches = [tiny.labelled(4, 8), tiny.labelled(4, 5, seed=1), tiny.labelled(4, 6, seed=2)]
    batches[1][1][2] = -100  # here "a" has no label
    batches[2][1][[0, 2, 3]] = -100  # and here nobody has
    network.set_adapter(rows=ROWS)
    parameters = network.parameters()
    assert len(parameters) == sum(len(network.adapter_parameters(name)) for name in "ab")
    together = float(ml.TrainStep(network, ml.AdamW(parameters)).gradients(batches))
    found = {name: {k: np.array(t.grad) for k, t in network.adapter_parameters(name).items()} for name in "ab"}
    alone = 0.0
    for name in "ab":
        own = [row for row, owner in enumerate(ROWS) if owner == name]
        network.set_adapter(name)
        mine = [(tokens[own], labels[own]) for tokens, labels in batches if (labels[own][:, 1:] >= 0).any()]
        total = sum(int((labels[:, 1:] >= 0).sum()) for _, labels in mine)
        parts = [tiny.gradients(network, tokens, labels, normaliser=total) for tokens, labels in mine]
        alone += sum(loss for loss, _ in parts)
        for key, gradient in found[name].items():
            assert tiny.relative_error(gradient, sum(part[key] for _, part in parts)) < 1e-12, key
    assert together == pytest.approx(alone, rel=1e-12)


def test_a_step_is_the_lines_that_it_stands_for():
    """zero_grad, loss, backward, clip, step: with rows too."""
    results = []
    for by_hand in (True, False):
        network = rows_model()
        network.set_adapter(rows=ROWS)
        optimiser = ml.AdamW(network.parameters(), lr=0.01)
        step = ml.TrainStep(network, optimiser, max_grad_norm=0.5)
        for seed in range(2):
            batch = tiny.labelled(4, 6, seed)
            if by_hand:
                optimiser.zero_grad()
                loss = network.loss(*batch)
                loss.backward()
                ml.clip_grad_norm(optimiser.parameters, 0.5)
                optimiser.step()
            else:
                loss = step(*batch)
        values = {key: tensor.data.tobytes() for key, tensor in network.parameters().items()}
        results.append((float(ml.to_numpy(loss)), values))
    assert results[0] == results[1]


def test_two_adapters_with_equal_matrices_draw_their_own_dropout_masks():
    losses = {}
    for dropout in (0.0, 0.5):
        for name in ("a", "b"):
            network = tiny.model()
            network.add_adapter(name, ml.LoraConfig(r=3, dropout=dropout), seed=4)
            for parameter in network.adapter_parameters(name).values():
                parameter.data = np.full_like(parameter.data, 0.1)
            losses[dropout, name] = float(network.loss(tiny.tokens()))
    assert losses[0.0, "a"] == losses[0.0, "b"]
    assert losses[0.5, "a"] != losses[0.5, "b"]
