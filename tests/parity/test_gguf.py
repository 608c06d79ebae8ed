"""SmolLM2 as it is shipped: logits of the GGUF file here against transformers, which decodes the same file."""

from __future__ import annotations

import numpy as np
import pytest

import minilora as ml
from tests import tiny
from tests.parity.reference import reference_logits

pytestmark = [pytest.mark.parity, pytest.mark.slow]

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "<|im_start|>user\nHow many legs has a spider?<|im_end|>\n<|im_start|>assistant\n",
]


def test_smollm2_has_the_logits_of_transformers(smollm2_reference):
    """Thirty layers in float32, each program with sums in its own order."""
    model = ml.load_model("smollm2")
    for prompt in PROMPTS:
        tokens = np.array([model.tokenizer.encode(prompt)])
        logits, expected = model.logits(tokens), reference_logits(smollm2_reference, tokens)
        assert tiny.relative_error(logits, expected) < 1e-5
        assert np.array_equal(logits.argmax(axis=-1), expected.argmax(axis=-1))
