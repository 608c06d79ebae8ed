"""The float64 that other tests compare with: no float32 value takes part in what transformers computes inside it."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.parity.reference import float64_casts, torch, transformers

pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
}
FAMILIES = {
    "llama": SIZES,
    "mistral": SIZES | {"sliding_window": 3},
    "qwen2": SIZES,
    "qwen3": SIZES | {"head_dim": 8},
    "gpt2": {"vocab_size": tiny.VOCABULARY, "n_embd": 24, "n_layer": 2, "n_head": 4},
}


class Dtypes(torch.utils._python_dispatch.TorchDispatchMode):
    """The dtypes of everything that torch's operations return, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        values = torch.utils._pytree.tree_leaves(result)
        self.seen |= {value.dtype for value in values if isinstance(value, torch.Tensor)}
        return result


def dtypes_of_a_training_pass(family: str) -> set:
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    tokens = torch.from_numpy(tiny.tokens(2, 9))
    with Dtypes() as dtypes:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    return dtypes.seen & {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_float64_inside(family):
    with float64_casts():
        assert dtypes_of_a_training_pass(family) == {torch.float64}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float64_model_computes_in_part_in_float32_outside(family):
    assert torch.float32 in dtypes_of_a_training_pass(family)
