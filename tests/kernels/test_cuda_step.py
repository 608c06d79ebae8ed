"""Whole training steps on the GPU: bfloat16 beside float32, recorded beside launch by launch, in every form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import minilora as ml
from minilora.backend import cast, dtype_of, to_device, to_numpy
from minilora.loading import new_model
from minilora.model import Model
from minilora.optim import clip_grad_norm
from minilora.tensor import definitions_only

LLAMA = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "vocab_size": 512, "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 512,
    "layer_norm_epsilon": 1e-5,
}  # fmt: skip
CONFIGS = {"llama": LLAMA, "gpt2": GPT2}
ADAPTER = ml.LoraConfig(r=8, alpha=16, target_modules="all-linear")


@pytest.fixture(autouse=True)
def gpu(device):
    if device == "cpu":
        pytest.skip("needs --device cuda")


def model_on(device: str, family: str, dtype: str, adapters: tuple[str, ...] = ("a",), std: float = 0.06) -> Model:
    """The same bfloat16 values in a model of `dtype`, with adapters whose B is not zero."""
    model = new_model(CONFIGS[family], seed=0, device="cpu", dtype="float32", std=std)
    for _, parameter in model.network.named_parameters():
        parameter.data = cast(cast(parameter.data, dtype_of("bfloat16")), dtype_of(dtype))
    model.to(device)
    random = np.random.default_rng(1)
    for number, name in enumerate(adapters):
        model.add_adapter(name, ADAPTER, seed=number)
        for key, tensor in model.adapter_parameters(name).items():
            if "lora_B" in key:
                tensor.data[...] = to_device(random.normal(0, 0.02, tensor.shape).astype(np.float32), device)
    return model


def batch(seed: int, rows: int = 4, length: int = 64, labelled: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 512, (rows, length))
    labels = np.where(random.random((rows, length)) < labelled, tokens, -100)
    return tokens, labels


def gradients(model: Model, *arguments: Any) -> tuple[float, dict[str, np.ndarray]]:
    for parameter in model.parameters().values():
        parameter.grad = None
    loss = model.loss(*arguments)
    loss.backward()
    return float(loss), {name: to_numpy(parameter.grad) for name, parameter in model.parameters().items()}


def distance(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest relative error in norm of any of the arrays."""
    assert found.keys() == expected.keys()
    return max(
        float(np.linalg.norm(found[name].astype(np.float64) - expected[name]) / np.linalg.norm(expected[name]))
        for name in expected
    )


SEGMENTS = np.repeat([[1, 2, 3, 0]], [20, 14, 25, 5], axis=1).repeat(4, axis=0)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_a_bfloat16_step_is_the_float32_step_to_bfloat16_rounding(family, segments, device):
    tokens, labels = batch(0, labelled=0.6)
    model = model_on(device, family, "bfloat16")
    assert model.dtype.name == "bfloat16"
    loss, grads = gradients(model, tokens, labels, segments)
    reference = model_on(device, family, "float32")
    assert reference.dtype.name == "float32"
    expected_loss, expected = gradients(reference, tokens, labels, segments)
    assert all(grad.dtype == np.float32 for grad in grads.values())
    assert loss == pytest.approx(expected_loss, rel=3e-3)
    assert distance(grads, expected) < 3e-2
    logits = to_numpy(model.logits(tokens, segments)).astype(np.float32)
    assert np.abs(logits - to_numpy(reference.logits(tokens, segments))).max() < 0.05 * np.abs(logits).max()


@pytest.mark.parametrize("family", CONFIGS)
def test_a_float32_step_with_kernels_is_the_step_of_the_definitions(family, device):
    tokens, labels = batch(0, labelled=0.6)
    model = model_on(device, family, "float32")
    loss, grads = gradients(model, tokens, labels, SEGMENTS)
    with definitions_only():
        expected_loss, expected = gradients(model, tokens, labels, SEGMENTS)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert distance(grads, expected) < 1e-4


def trained(model: Model, steps: int, recorded: bool, **form: Any) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and parameters of some steps over changing batches: of TrainStep, or written out."""
    optimiser = ml.AdamW(model.parameters(), lr=1e-3)
    step = ml.TrainStep(model, optimiser, max_grad_norm=1.0)
    losses = []
    for number in range(steps):
        tokens, labels = batch(number, labelled=(1.0, 0.5, 0.47)[number % 3], **form)
        if recorded:
            losses.append(step(tokens, labels))
        else:
            optimiser.zero_grad()
            loss = model.loss(tokens, labels)
            loss.backward()
            clip_grad_norm(model.parameters(), 1.0)
            optimiser.step()
            losses.append(loss)
    if recorded:
        assert len(step.recorder.recordings) > 0, "nothing was recorded"
    return [float(loss) for loss in losses], {name: to_numpy(p) for name, p in model.parameters().items()}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_recorded_steps_are_the_steps_launch_by_launch(family, checkpoint, device):
    results = []
    for recorded in (True, False):
        model = model_on(device, family, "bfloat16")
        model.checkpoint = checkpoint
        results.append(trained(model, 12, recorded))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=2e-3)
    assert distance(*(parameters for _, parameters in results)) < 2e-2


@pytest.mark.parametrize("family", CONFIGS)
def test_recorded_steps_learn_a_batch_by_heart(family, device):
    model = model_on(device, family, "bfloat16")
    step = ml.TrainStep(model, ml.AdamW(model.parameters(), lr=5e-3))
    losses = [float(step(*batch(0))) for _ in range(20)]
    assert losses[-1] < 0.25 * losses[0]


def test_a_recorded_step_gives_the_same_bits_every_time(device):
    outcomes = [trained(model_on(device, "llama", "bfloat16"), 9, True) for _ in range(2)]
    assert outcomes[0][0] == outcomes[1][0]
    for name, array in outcomes[0][1].items():
        assert np.array_equal(array, outcomes[1][1][name])


def test_shapes_alternate_and_the_selection_changes_without_stale_recordings(device):
    model = model_on(device, "llama", "bfloat16", ("a", "b"))
    steps = {name: ml.TrainStep(model, ml.AdamW(model.adapter_parameters(name), lr=1e-3)) for name in ("a", "b")}
    for number in range(24):
        name, length = "ab"[number % 2], (32, 64, 48, 130)[number % 4 // 2 + 2 * (number % 3 == 2)]
        model.set_adapter(name)
        tokens, labels = batch(number, length=length)
        expected = float(model.loss(tokens, labels))
        assert float(steps[name](tokens, labels)) == pytest.approx(expected, rel=1e-4)
    model.merge_adapter("a")
    merged = model.logits(batch(0)[0])
    model.unmerge_adapter()
    model.set_adapter("a")
    unmerged = model.logits(batch(0)[0])
    error = to_numpy(merged).astype(np.float32) - to_numpy(unmerged).astype(np.float32)
    assert np.abs(error).max() < 0.05 * float(np.abs(to_numpy(unmerged).astype(np.float32)).max())


def test_accumulation_is_one_recording_too(device):
    model, plain = (model_on(device, "llama", "bfloat16") for _ in range(2))
    step = ml.TrainStep(model, ml.AdamW(model.parameters(), lr=1e-3))
    by_hand = ml.TrainStep(plain, ml.AdamW(plain.parameters(), lr=1e-3))
    for number in range(5):
        parts = [batch(10 * number + part, rows=2, labelled=0.7) for part in range(3)]
        loss = step.gradients(parts)
        whole = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        expected = by_hand.gradients([whole])
        assert float(loss) == pytest.approx(float(expected), rel=2e-3)
        found, wanted = ({name: to_numpy(p.grad) for name, p in each.parameters().items()} for each in (model, plain))
        assert distance(found, wanted) < 2e-2
        step.update()
        by_hand.update()


def test_an_adapter_per_row_trains_grouped(device):
    model, alone = (model_on(device, "llama", "bfloat16", ("a", "b")) for _ in range(2))
    step = ml.TrainStep(model, {name: ml.AdamW(model.adapter_parameters(name), lr=1e-3) for name in ("a", "b")})
    for number in range(5):
        tokens, labels = batch(number)
        losses = step(tokens, labels, rows=["a", "b", "b", "a"])
        if number == 0:
            for name, mine in (("a", [0, 3]), ("b", [1, 2])):
                alone.set_adapter(name)
                expected, grads = gradients(alone, tokens[mine], labels[mine])
                assert float(losses[name]) == pytest.approx(expected, rel=3e-3)
                found = {key: to_numpy(p.grad) for key, p in model.adapter_parameters(name).items()}
                assert distance(found, grads) < 3e-2


def test_recordings_read_a_table_for_longer_segments_too(device):
    model, plain = (model_on(device, "llama", "bfloat16") for _ in range(2))
    step = ml.TrainStep(model, ml.AdamW(model.parameters(), lr=0.0))
    for number in range(5):
        tokens, labels = batch(number)
        segments = np.repeat([[1, 2, 3, 4]], 16, axis=1).repeat(4, axis=0) if number < 3 else np.ones((4, 64), int)
        loss = step(tokens, labels, segments)
        assert float(loss) == pytest.approx(float(plain.loss(tokens, labels, segments)), rel=2e-3)
    assert len(step.recorder.recordings) > 0


def test_another_adapter_s_pass_between_steps_leaves_the_recordings_right(device):
    model, plain = (model_on(device, "llama", "bfloat16", ("a", "b")) for _ in range(2))
    step = ml.TrainStep(model, ml.AdamW(model.adapter_parameters("a"), lr=0.0))
    plain.set_adapter("a")
    for number in range(7):
        if number == 2:  # what the next step rounds into is to be made anew, so that step is not the one recorded
            model.set_adapter("b")
            model.logits(batch(0)[0])
        model.set_adapter("a")
        loss = step(*batch(number))
        assert len(step.recorder.recordings) == int(number > 2)
        expected, grads = gradients(plain, *batch(number))
        assert float(loss) == pytest.approx(expected, rel=2e-3)
        assert distance({key: to_numpy(p.grad) for key, p in model.parameters().items()}, grads) < 2e-2


def test_generation_on_the_gpu_is_greedy_generation_on_the_cpu(device):
    prompt = batch(3, rows=1, length=9)[0][0].tolist()
    texts = []
    for place, dtype in ((device, "float32"), ("cpu", "float32")):
        model = model_on(place, "llama", dtype, std=0.2)
        texts.append(model.generate(prompt, 12, temperature=0, stop=[]))
    assert texts[0] == texts[1]
    model_on(device, "llama", "bfloat16").generate(prompt, 4, temperature=0, stop=[])
