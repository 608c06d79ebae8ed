"""minilora bench: what is measured, of what, and the share of the machine's limit."""

from __future__ import annotations

import json
import sys

import pytest

import minilora as ml
from minilora.cli.bench import bytes_read, gemm_speed, step_operations, timed
from tests import tiny

QUICK = ["--seconds", 0, "--batch-size", 2, "--max-length", 8, "--new-tokens", 3]


def test_a_tiny_model_is_measured_in_training_and_in_decoding(run, base):
    status, out, err = run("bench", "--model", base, *QUICK, "--rank", 2, "--targets", "q_proj, v_proj", "--json")
    assert status == 0
    assert "GFLOP/s" in err
    report = json.loads(out)
    training, decoding = report["results"]
    assert (training["tokens"], decoding["tokens"]) == (16, 3)
    for result in report["results"]:
        assert result["tokens_per_second"] == pytest.approx(result["tokens"] / result["seconds"])
        assert result["peak_bytes"] > 1e6
    assert 0 < training["gemm_share"] < 1
    assert decoding["read_bytes_per_second"] > 0


def test_the_table_says_what_was_asked_for(run, base):
    status, out, _ = run("bench", "--model", base, *QUICK, "--checkpoint")
    assert status == 0
    assert "training, 2 × 8, checkpointing" in out
    assert "decoding 3 tokens" in out
    assert out.startswith(f"{base}, ")
    assert " parameters in float32, on the CPU (threads: " in out
    assert "; LoRA of rank 8 on all-linear\n" in out


def test_targets_are_those_of_train(run, base):
    status, out, err = run("bench", "--model", base, *QUICK, "--targets", r".*\.0\..*q_proj")
    assert (status, r"LoRA of rank 8 on .*\.0\..*q_proj" in out) == (0, True), err


@pytest.mark.parametrize("tied", [False, True])
def test_of_an_embedding_that_is_not_the_head_no_token_reads_all(tied):
    model = ml.new_model(tiny.LLAMA | {"tie_word_embeddings": tied})
    sizes = {name: tensor.data.nbytes for name, tensor in model.network.named_parameters()}
    assert bytes_read(model) == sum(sizes.values()) - (0 if tied else sizes["model.embed_tokens.weight"])


def test_without_cupy_a_gpu_is_one_line(run, base, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    status, out, err = run("bench", "--model", base, *QUICK, "--device", "cuda")
    assert (status, out) == (1, "")
    assert err.startswith("error: --device 'cuda' needs CuPy, not installed here: pip install 'minilora[cuda12]'")
    assert len(err.splitlines()) == 1


def test_what_does_not_fit_the_context_and_a_wrong_target_are_one_line(run, base):
    status, _, err = run("bench", "--model", base, "--max-length", 100_000)
    assert (status, "over the model's context" in err) == (1, True)
    status, _, err = run("bench", "--model", base, *QUICK, "--targets", "nothing_like_it")
    assert (status, err.startswith("error: ")) == (1, True)


def test_operations_of_a_step_are_those_of_its_products():
    """By hand: 2 layers with q, o (24 × 32), k, v (24 × 16), gate, up, down (24 × 40), and the head (61 × 24)."""
    weights = 2 * (2 * 24 * 32 + 2 * 24 * 16 + 3 * 24 * 40) + 61 * 24
    scores = 2 * 4 * 8 * 7 * 7 / 2
    assert step_operations(tiny.model(), 3, 7) == 3 * (4 * weights * 7 + 12 * scores)


def test_a_measurement_is_repeated_at_least_twice_after_one_that_does_not_count():
    calls = []
    assert len(timed(lambda: calls.append(1), 0)) == 2
    assert len(calls) == 3
    assert gemm_speed(ml.new_model(tiny.llama())) > 1e8
