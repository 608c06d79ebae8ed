"""The table before the start counts what is trained, pattern by pattern."""

import minilora as ml
from minilora.train.table import Row, summarise
from tests import tiny
from tests.train import made

HIDDEN, INNER, Q, KV = 24, 40, 32, 16  # of tests.tiny


def all_parameters(network):
    return sum(tensor.size for _, tensor in network.network.named_parameters())


def test_all_linear_is_told_by_the_layers_it_found():
    network = made.model(r=3, alpha=6)
    summary = summarise(network)
    assert summary.rows[0] == Row("all-linear: q_proj", 2, "3", "2", 2 * 3 * (HIDDEN + Q))
    assert {row.pattern.removeprefix("all-linear: "): row.layers for row in summary.rows} == dict.fromkeys(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 2
    )
    assert summary.trainable == sum(row.trainable for row in summary.rows)
    assert summary.trainable == sum(tensor.size for tensor in network.adapter_parameters("a").values())
    assert summary.total == all_parameters(network) + summary.trainable


def test_each_pattern_of_a_list_has_its_line_with_every_rank_and_scale_in_it():
    network = made.model(
        r=4, alpha=8, target_modules=["v_proj", "mlp.up_proj"], rank_pattern={r"layers\.1\.mlp\.up_proj": 2},
        alpha_pattern={"v_proj": 1},
    )  # fmt: skip
    assert summarise(network).rows == [
        Row("v_proj", 2, "4", "0.25", 2 * 4 * (HIDDEN + KV)),
        Row("mlp.up_proj", 2, "2, 4", "2, 4", (4 + 2) * (HIDDEN + INNER)),
    ]


def test_rslora_and_the_weight_of_the_selection_are_in_the_scale():
    network = made.model(r=4, alpha=8, use_rslora=True, target_modules="model.layers.[01].mlp.up_proj")
    network.set_adapter({"a": 0.5})
    assert summarise(network).rows == [
        Row("model.layers.[01].mlp.up_proj: up_proj", 2, "4", "2", 2 * 4 * (HIDDEN + INNER))
    ]


def test_what_an_adapter_trains_whole_has_lines_of_its_own():
    network = ml.new_model(tiny.gpt2(), seed=0)
    network.add_adapter(
        "a", ml.LoraConfig(r=2, alpha=4, target_modules=["c_attn", "wte"], modules_to_save=["ln_f"], bias="lora_only")
    )
    summary = summarise(network)
    assert summary.rows == [
        Row("wte", 1, "2", "2", 2 * (61 + HIDDEN)),
        Row("c_attn", 2, "2", "2", 2 * 2 * (HIDDEN + 3 * HIDDEN)),
        Row("own copy: c_attn.bias", 2, "", "", 2 * 3 * HIDDEN),
        Row("own copy: ln_f.weight", 1, "", "", HIDDEN),
        Row("own copy: ln_f.bias", 1, "", "", HIDDEN),
    ]
    assert summary.trainable == sum(row.trainable for row in summary.rows)


def test_a_rank_above_a_layer_s_size_is_said():
    assert summarise(made.model(r=16)).excess == []  # v_proj has 16 rows
    summary = summarise(made.model(r=20, target_modules=["v_proj", "up_proj", "embed_tokens"]))
    assert summary.excess == [(f"model.layers.{layer}.self_attn.v_proj", 20, KV) for layer in (0, 1)]
    assert summary.text().splitlines()[-1] == (
        "2 layers have a higher rank than their ΔW can have, first model.layers.0.self_attn.v_proj: rank 20, and its "
        "ΔW has at most 16, for which rank 16 is enough"
    )


def test_unfrozen_base_parameters_have_lines_of_their_own():
    network = ml.new_model(tiny.llama(), seed=0)
    network.unfreeze(["down_proj.weight", "model.norm.weight"])
    summary = summarise(network)
    assert summary.rows == [
        Row("base: down_proj.weight", 2, "", "", 2 * HIDDEN * INNER),
        Row("base: norm.weight", 1, "", "", HIDDEN),
    ]
    assert summary.total == all_parameters(network)


def test_the_text_aligns_its_columns_and_ends_in_the_share():
    summary = summarise(made.model(target_modules=["v_proj", "up_proj"]))
    lines = summary.text().splitlines()
    assert lines[0].split() == ["target", "layers", "rank", "scale", "trainable"]
    assert lines[2].split() == ["v_proj", "2", "3", "2", "240"]
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[-1] == f"624 of {summary.total:,} parameters are trained ({624 / summary.total:.3%})"
