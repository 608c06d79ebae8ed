"""What a step asks of the model, and what it leaves behind."""

from __future__ import annotations

import numpy as np
import pytest

import minilora as ml
from tests import tiny


def two_adapters() -> ml.Model:
    model = tiny.model()
    for name in ("a", "b"):
        model.add_adapter(name, ml.LoraConfig(r=2, alpha=4))
    return model


def test_an_adapter_without_an_optimiser_gathers_no_gradients_from_step_to_step():
    model = two_adapters()
    model.set_adapter(rows=["a", "b"])
    step = ml.TrainStep(model, ml.AdamW(model.adapter_parameters("a"), lr=0.0))
    tokens = tiny.tokens()
    seen = []
    for _ in range(3):
        step(tokens)
        seen.append({key: tensor.grad.copy() for key, tensor in model.adapter_parameters("b").items()})
    for key, first in seen[0].items():
        np.testing.assert_array_equal(seen[2][key], first)


def test_a_step_in_which_nothing_is_trained_is_named():
    model = two_adapters()
    step = ml.TrainStep(model, ml.AdamW(model.adapter_parameters("a")))
    model.set_adapter(None)
    with pytest.raises(ml.MiniloraError, match="select an adapter with set_adapter, or unfreeze"):
        step(tiny.tokens())


def test_merging_and_unmerging_take_no_training_along():
    """Both put other Tensors in the place of the base's: an optimiser would go on with the ones that are gone."""
    model = two_adapters()
    model.unfreeze(["q_proj.weight"])
    with pytest.raises(ml.MiniloraError, match=r"q_proj\.weight is trained itself, and merging would replace it"):
        model.merge_adapter("a")
    merged = two_adapters()
    merged.merge_adapter("a")
    merged.unfreeze(["q_proj.weight"])
    with pytest.raises(ml.MiniloraError, match=r"q_proj\.weight was unfrozen after the merge"):
        merged.unmerge_adapter()
