"""Which layers an adapter goes to: PEFT's rules, and what is said of a pattern that matches nothing."""

from __future__ import annotations

import pytest

from minilora.errors import MiniloraError
from minilora.lora.config import LoraConfig
from minilora.lora.targets import check_patterns, pattern_value, saved_names, shortest_patterns, target_names

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
NAMES = [
    f"model.layers.{layer}.{part}.{name}"
    for layer in range(12)
    for part, names in (("self_attn", ATTENTION), ("mlp", MLP))
    for name in names
] + ["lm_head"]


def targets(**config):
    return target_names(NAMES, LoraConfig(**config))


def test_all_linear_is_everything_but_the_head():
    assert targets() == NAMES[:-1]


def test_a_list_matches_the_ends_of_names_at_a_dot():
    assert targets(target_modules=["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in range(12)]
    assert targets(target_modules=["mlp.up_proj"]) == [f"model.layers.{i}.mlp.up_proj" for i in range(12)]
    assert targets(target_modules=["lm_head"]) == ["lm_head"]
    # "1.self_attn.q_proj" is layer 1's and not layer 11's
    assert targets(target_modules=["1.self_attn.q_proj"]) == ["model.layers.1.self_attn.q_proj"]


def test_a_list_keeps_the_order_of_the_model():
    chosen = targets(target_modules=["v_proj", "q_proj"])
    assert chosen == [name for name in NAMES if name.endswith(("q_proj", "v_proj"))]


def test_a_string_is_a_regular_expression_for_the_whole_name():
    assert targets(target_modules=r".*\.(10|11)\.mlp\.up_proj") == [f"model.layers.{i}.mlp.up_proj" for i in (10, 11)]
    with pytest.raises(MiniloraError):
        targets(target_modules="q_proj")  # a search would find it


def test_embeddings_are_targets_where_they_are_named_and_no_linear_layers():
    names, table = ["model.embed_tokens", *NAMES], {"model.embed_tokens"}
    assert target_names(names, LoraConfig(target_modules="All-Linear"), table) == NAMES[:-1]
    assert target_names(names, LoraConfig(target_modules=["embed_tokens"]), table) == ["model.embed_tokens"]
    assert target_names(names, LoraConfig(target_modules=r".*(embed_tokens|lm_head)"), table) == [names[0], names[-1]]


def test_what_is_trained_whole_is_no_target():
    saved = saved_names(["model.layers.3.mlp", *NAMES], ["layers.3.mlp", "lm_head"])
    assert saved == ["model.layers.3.mlp", *(f"model.layers.3.mlp.{name}" for name in MLP), "lm_head"]
    chosen = target_names(NAMES, LoraConfig(target_modules=["up_proj", "lm_head"]), saved=saved)
    assert chosen == [f"model.layers.{layer}.mlp.up_proj" for layer in range(12) if layer != 3]


def test_modules_to_save_are_ends_of_names_as_in_peft():
    """Also without a dot before them: "norm" is every norm, "model.norm" the last one alone."""
    names = ["model", "model.norm", "model.layers.0", "model.layers.0.input_layernorm", "model.layers.10"]
    assert saved_names(names, ["norm"]) == ["model.norm", "model.layers.0.input_layernorm"]
    assert saved_names(names, ["model.norm"]) == ["model.norm"]
    assert saved_names(names, ["layers.0"]) == ["model.layers.0", "model.layers.0.input_layernorm"]
    assert saved_names([*names, "model.layers.1"], ["layers.1"]) == ["model.layers.1"]
    with pytest.raises(MiniloraError, match=r"modules_to_save 'layer\.0' matches no module"):
        saved_names(names, ["norm", "layer.0"])


def test_exclusions_win_and_are_matched_the_same_way():
    assert targets(exclude_modules=ATTENTION) == [name for name in NAMES if ".mlp." in name]
    chosen = targets(target_modules=["q_proj"], exclude_modules=r".*\.[1-9]\d*\..*")
    assert chosen == ["model.layers.0.self_attn.q_proj"]


def test_layers_are_chosen_by_their_number():
    assert targets(target_modules=["q_proj"], layers_to_transform=[1, 11]) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.11.self_attn.q_proj",
    ]


def test_a_module_that_is_named_in_full_is_adapted_whatever_the_layers():
    chosen = targets(target_modules=["lm_head", "q_proj"], layers_to_transform=[0])
    assert chosen == ["model.layers.0.self_attn.q_proj", "lm_head"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"target_modules": ["q_prj"]},
            r"target_modules 'q_prj' matches no linear layer or embedding; did you mean 'q_proj'\?",
        ),
        ({"target_modules": ["q_proj", "query"]}, "'query' matches no linear layer .*the model's names end in"),
        ({"target_modules": []}, "no linear layer or embedding is left to adapt"),
        ({"target_modules": "model.layers.*.q"}, "target_modules 'model.layers.*.q' matches no linear layer"),
        ({"target_modules": "("}, r"target_modules '\(' is not a regular expression"),
        ({"exclude_modules": ["q_prj"]}, "exclude_modules 'q_prj' matches no linear layer .*did you mean 'q_proj'"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "no linear layer or embedding is left"),
        ({"layers_to_transform": [3, 12]}, r"layers_to_transform has 12, .*\(layers: 0 to 11\)"),
        ({"target_modules": ["lm_head"], "layers_to_transform": [0]}, "layers_to_transform has 0"),
    ],
)
def test_a_pattern_that_matches_nothing_is_named_with_what_was_perhaps_meant(config, message):
    with pytest.raises(MiniloraError, match=message):
        targets(**config)


def test_patterns_are_regular_expressions_for_the_end_of_a_name_and_the_first_wins():
    patterns = {r"layers\.1\..*q_proj": 2, "q_proj": 4, "1.mlp.up_proj": 8}
    assert pattern_value("model.layers.1.self_attn.q_proj", patterns, 16) == 2
    assert pattern_value("model.layers.11.self_attn.q_proj", patterns, 16) == 4
    assert pattern_value("model.layers.1.mlp.up_proj", patterns, 16) == 8
    assert pattern_value("model.layers.11.mlp.up_proj", patterns, 16) == 16
    assert pattern_value("model.layers.1.mlp.gate_proj", patterns, 16) == 16
    assert pattern_value("model.layers.0.mlp.xq_proj", patterns, 16) == 16  # no dot before the pattern


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"q_proj": 2, "q_prj": 3}, "rank_pattern 'q_prj' matches none of the adapted layers; did you mean 'q_proj'"),
        ({"v_proj": 2}, "rank_pattern 'v_proj' matches none of the adapted layers"),
        ({"(": 2}, r"rank_pattern '\(' is not a regular expression"),
    ],
)
def test_a_rank_pattern_has_to_match_an_adapted_layer(patterns, message):
    with pytest.raises(MiniloraError, match=message):
        check_patterns(targets(target_modules=["q_proj"]), patterns, "rank_pattern")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [3, 11]},
        {"target_modules": r".*\.1\.mlp\..*"},
        {"target_modules": ["lm_head", "v_proj"], "exclude_modules": ["1.self_attn.v_proj"]},
    ],
)
def test_the_shortest_patterns_select_the_same_layers(config):
    chosen = targets(**config)
    patterns = shortest_patterns(chosen, NAMES)
    assert targets(target_modules=patterns) == chosen
    assert len(patterns) <= len(chosen)


def test_beside_layers_to_transform_a_module_outside_of_blocks_is_named_in_full():
    """By its last part alone it would be none of those layers'."""
    names = ["model.embed_tokens", *NAMES]
    chosen = ["model.embed_tokens", "model.layers.0.mlp.up_proj"]
    patterns = shortest_patterns(chosen, names, by_layer=True)
    assert target_names(names, LoraConfig(target_modules=patterns, layers_to_transform=[0])) == chosen
    assert "embed_tokens" in shortest_patterns(chosen, names)


def test_layers_that_are_all_adapted_are_named_by_their_last_part():
    assert shortest_patterns(targets(target_modules=["q_proj", "mlp.up_proj"]), NAMES) == ["q_proj", "up_proj"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": 2.0}, r"r is 2\.0"),
        ({"r": True}, "r is True"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\['q_proj'\] is -1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": "16"}, "alpha is '16'"),
        ({"alpha": 10**400}, "alpha is 1000"),
        ({"alpha_pattern": {"q_proj": None}}, r"alpha_pattern\['q_proj'\] is None"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": "x"}, "dropout is 'x', expected a probability"),
        ({"target_modules": 5}, "target_modules is 5, expected a list of names"),
        ({"target_modules": [["q_proj"]]}, "target_modules is "),
        ({"exclude_modules": [1]}, r"exclude_modules is \[1\]"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1', expected a list of block numbers"),
        ({"layers_to_transform": [True]}, r"layers_to_transform is \[True\]"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\], expected {pattern: value}"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', expected True or False"),
        ({"init": "random"}, "init is 'random', expected one of kaiming, gaussian, zeros, pissa or pissa_niter_N"),
        ({"bias": "some"}, "bias is 'some', expected one of none"),
        (
            {"modules_to_save": "lm_head"},
            r"modules_to_save is 'lm_head', expected a list of names, e\.g\. \['lm_head'\]",
        ),
    ],
)
def test_a_field_out_of_range_is_named(fields, message):
    with pytest.raises(MiniloraError, match=f"LoraConfig.{message}"):
        LoraConfig(**fields)


def test_a_changed_copy_is_checked_like_a_new_config():
    config = LoraConfig(r=4)
    assert config.with_changes(alpha=1).alpha == 1
    with pytest.raises(MiniloraError):
        config.with_changes(r=0)
