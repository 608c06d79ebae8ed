"""Updates between formats: whatever rank and scale a file wants, each ΔW stays what it was."""

from __future__ import annotations

import numpy as np
import pytest

from minilora.errors import MiniloraError
from minilora.formats.updates import Update, most_common, peft_adapter, updates_of
from minilora.lora.config import LoraConfig

PREFIX = "base_model.model."


def update(rank: int = 2, scale: float = 3.0, seed: int = 0, **more) -> Update:
    random = np.random.default_rng(seed)
    return Update(random.normal(size=(rank, 5)), random.normal(size=(4, rank)), scale, **more)


def delta(update: Update) -> np.ndarray:
    return update.scale * update.lora_B @ update.lora_A


@pytest.mark.parametrize("scale", [3.0, 0.7, -1.5, 1e-3])
def test_another_scale_leaves_the_update_as_it_is(scale):
    before = update()
    after = before.scaled_to(scale)
    assert after.scale == scale
    np.testing.assert_allclose(delta(after), delta(before), rtol=1e-14)


def test_the_same_scale_leaves_the_matrices_bit_for_bit():
    before = update()
    assert before.scaled_to(before.scale) is before


def test_a_higher_rank_leaves_the_update_as_it_is():
    before = update(rank=2)
    after = before.padded_to(5)
    assert (after.lora_A.shape, after.lora_B.shape) == ((5, 5), (4, 5))
    np.testing.assert_array_equal(delta(after), delta(before))


def test_each_module_has_its_own_rank_and_scale():
    config = LoraConfig(r=2, alpha=8, use_rslora=True, rank_pattern={"k_proj": 4}, alpha_pattern={"k_proj": 3})
    tensors = {}
    for name, rank in (("q_proj", 2), ("k_proj", 4)):
        tensors[f"{PREFIX}{name}.lora_A.weight"] = np.zeros((rank, 5))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = np.zeros((6, rank))
    updates = updates_of(config, tensors, "a tool")
    assert updates["q_proj"].scale == 8 / np.sqrt(2)
    assert updates["k_proj"].scale == 3 / np.sqrt(4)


def test_updates_become_the_peft_adapter_that_they_came_from():
    updates = {
        "a.q_proj": update(2, 4.0),
        "a.k_proj": update(2, 4.0, seed=1),
        "b.q_proj": update(4, 2.0, seed=2, magnitude=np.ones(4)),
        "wte": update(2, 4.0, seed=3, embedding=True),
    }
    config, tensors = peft_adapter(updates, alpha=8.0, dropout=0.25)
    assert (config.r, config.alpha, config.dropout, config.use_dora) == (2, 8.0, 0.25, True)
    assert f"{PREFIX}wte.lora_embedding_A" in tensors
    assert f"{PREFIX}b.q_proj.lora_magnitude_vector" in tensors
    again = updates_of(config, tensors, "a tool")
    assert again.keys() == updates.keys()
    for name, update_ in updates.items():
        assert again[name].scale == update_.scale
        assert again[name].embedding == update_.embedding
        np.testing.assert_array_equal(again[name].lora_A, update_.lora_A)
        np.testing.assert_array_equal(again[name].lora_B, update_.lora_B)


def test_a_pattern_of_a_rank_matches_its_own_module_only():
    config, _ = peft_adapter({"h.1.q": update(2), "h.11.q": update(4), "h.21.q": update(2)}, alpha=1.0)
    assert list(config.rank_pattern.values()) == [4]
    assert updates_of(config, {f"{PREFIX}h.1.q.{part}": np.zeros((2, 2)) for part in PARTS}, "x")["h.1.q"].scale == 0.5


PARTS = ("lora_A.weight", "lora_B.weight")


@pytest.mark.parametrize("key", ["lm_head.weight", "model.layers.0.self_attn.q_proj.base_layer.bias"])
def test_what_is_no_update_is_refused_by_its_name(key):
    with pytest.raises(MiniloraError, match=rf"{key}, which an adapter file of mlx-lm has no place for"):
        updates_of(LoraConfig(), {f"{PREFIX}{key}": np.zeros(3)}, "mlx-lm")


def test_an_adapter_whose_base_has_changed_is_refused():
    with pytest.raises(MiniloraError, match=r"principal part \(PiSSA\)"):
        updates_of(LoraConfig(init="pissa"), {}, "llama.cpp")


def test_a_scale_of_zero_is_nobody_s_common_one():
    """Else an update of another scale could not be said, and llama.cpp would take alpha = 0 for a factor of 1."""
    assert most_common([0.0, 0.0, 2.0]) == 2.0
    assert most_common([0.0]) == 1.0
    assert not delta(update(scale=0.0).scaled_to(2.0)).any()
