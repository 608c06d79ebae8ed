"""`minilora gradcheck`: right gradients pass layer by layer, a wrong one is named with exit status 1."""

from __future__ import annotations

import json

import numpy as np
import pytest

from minilora.cli.gradcheck import TEXT, tokens_of
from minilora.errors import MiniloraError
from minilora.loading import load_model
from minilora.tensor import PRIMITIVES


def test_every_layer_of_a_model_and_its_adapter_is_compared(run, base, adapter):
    status, out, _ = run("gradcheck", "--model", base, "--adapter", adapter, "--entries", 2, "--json")
    assert status == 0
    reports = json.loads(out)
    assert list(reports) == ["model.layers.0", "model.layers.1"]
    for report in reports.values():
        assert report["directions"] == 1
        assert report["entries"] + report["undecided"] + report["zero"] >= 2
        assert report["wrong"] == 0
        assert report["worst_relative_error"] < 1e-6


def test_a_new_adapter_is_checked_where_none_is_given(run, base):
    status, out, _ = run("gradcheck", "--model", base, "--text", "Hello there", "--rank", 2)
    assert status == 0
    assert out.count(" ok") == 2
    assert "4 comparisons in 2 layers" in out


@pytest.mark.parametrize("factor", [2.0, -1.0])
def test_a_wrong_gradient_is_one_line_and_status_1(run, base, adapter, monkeypatch, factor):
    """dA of every LoRA layer is made twice as large, or turned around."""
    primitive = PRIMITIVES["lora_linear"]
    right = primitive.definition

    def wrong(*arrays, **options):
        value, vjp = right(*arrays, **options)

        def scaled(dy):
            gradients = list(vjp(dy))
            gradients[3] = gradients[3] * factor
            return tuple(gradients)

        return value, scaled

    monkeypatch.setattr(primitive, "definition", wrong)
    monkeypatch.setattr(primitive, "kernels", [])
    status, out, err = run("gradcheck", "--model", base, "--adapter", adapter)
    assert status == 1
    assert "WRONG" in out
    message = err.splitlines()[-1]
    assert message.startswith("error: the gradient of the loss in model.layers.")
    assert "is wrong" in message


def test_nothing_to_compare_and_a_text_of_one_token_are_refused(run, base):
    assert run("gradcheck", "--model", base, "--entries", 0, "--directions", 0)[0] == 1
    status, _, err = run("gradcheck", "--model", base, "--text", "H")
    assert (status, "expected at least 2" in err) == (1, True)


def test_tokens_are_the_text_s_or_drawn_from_the_seed_where_there_is_no_tokenizer(base):
    model = load_model(base)
    assert tokens_of(model, "Hello", 3, seed=0).tolist() == [model.tokenizer.encode("Hello")[:3]]
    model.tokenizer = None
    first, again, other = (tokens_of(model, TEXT, 8, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    with pytest.raises(MiniloraError, match="no tokenizer"):
        tokens_of(model, "Hello", 8, seed=0)
