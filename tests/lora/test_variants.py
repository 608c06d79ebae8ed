"""The variants of LoRA: where each starts, its gradients, and that all that an adapter can do holds for each."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext

import numpy as np
import pytest

import minilora as ml
from minilora.backend import to_device
from minilora.errors import MiniloraError
from minilora.lora.variants.lora_plus import lora_plus
from minilora.lora.variants.pissa import singular_triplets
from minilora.ops import CompressedWeight
from minilora.tensor import definitions_only
from tests import tiny

VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "gaussian": {"init": "gaussian"},
    "dropout": {"dropout": 0.3},
    "dora": {"use_dora": True},
    "dora, rslora, dropout": {"use_dora": True, "use_rslora": True, "dropout": 0.3},
    "pissa": {"init": "pissa"},
    "pissa_niter": {"init": "pissa_niter_3", "use_rslora": True},
    "pissa, negative alpha, dropout": {"init": "pissa", "alpha": -6, "dropout": 0.3},
    "lora_fa": {"variant": "lora_fa"},
}
EXACT_START = [name for name in VARIANTS if "pissa" not in name]
FAMILIES = ["llama", "gpt2"]  # gpt2: weights that are views of (in, out) arrays, biases, widths that all differ
variants = pytest.mark.parametrize("name", VARIANTS)
families = pytest.mark.parametrize("family", FAMILIES)


def config(name: str, **changes: object) -> ml.LoraConfig:
    return ml.LoraConfig(**({"r": 3, "alpha": 6} | VARIANTS[name] | changes))


def base(family: str = "llama", dtype: str = "float64", device: str = "cpu") -> ml.Model:
    network = ml.new_model(tiny.FAMILIES[family], dtype=dtype, std=0.3)
    random = np.random.default_rng(5)
    for name, parameter in network.network.named_parameters():
        if name.endswith("bias"):
            parameter.data = parameter.data + random.normal(0, 0.2, parameter.shape).astype(parameter.dtype)
    return network.to(device)


def disturb(network: ml.Model, name: str, seed: int = 0) -> None:
    """Move all that an adapter trains away from where it starts."""
    random = np.random.default_rng(seed)
    for tensor in network.adapter_parameters(name).values():
        if tensor.requires_grad:
            step = random.normal(0, 0.2, tensor.shape).astype(tensor.dtype)
            tensor.data += to_device(step, tensor.device)


def adapted(name: str, family: str = "llama", device: str = "cpu", adapter: str = "a", seed: int = 0) -> ml.Model:
    network = base(family, device=device)
    network.add_adapter(adapter, config(name), seed=seed)
    disturb(network, adapter, seed)
    return network


def logits(network: ml.Model, tokens: np.ndarray) -> np.ndarray:
    return ml.to_numpy(network.logits(tokens))


def bits(network: ml.Model) -> dict[str, bytes]:
    return {name: ml.to_numpy(parameter).tobytes() for name, parameter in network.network.named_parameters()}


# --- what holds for each ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", EXACT_START)
@families
def test_a_new_adapter_changes_no_bit_of_the_logits(family, name, dtype):
    network = base(family, dtype)
    tokens = tiny.tokens()
    expected = logits(network, tokens)
    network.add_adapter("a", config(name))
    assert np.array_equal(logits(network, tokens), expected)


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - set(EXACT_START)))
@families
def test_pissa_starts_as_the_base_to_rounding(family, name, device):
    tokens = tiny.tokens()
    for dtype, rounding in (("float64", 1e-13), ("float32", 1e-5)):
        network = base(family, dtype, device)
        expected, weights = logits(network, tokens), bits(network)
        network.add_adapter("a", config(name))
        assert tiny.relative_error(logits(network, tokens), expected) < rounding
        assert bits(network) == weights


@variants
@families
def test_the_gradients_are_those_of_finite_differences(family, name, device):
    network = adapted(name, family, device)
    reports = ml.gradcheck_model(network, tiny.tokens(2, 5), adapter="a")
    for report in reports.values():
        report.raise_if_wrong()
        assert report.checked


@variants
@families
def test_merging_leaves_the_logits_and_unmerging_restores_every_bit(family, name, device):
    network = adapted(name, family, device)
    tokens = tiny.tokens()
    expected, weights = logits(network, tokens), bits(network)
    network.merge_adapter("a")
    assert bits(network) != weights
    assert tiny.relative_error(logits(network, tokens), expected) < 1e-13
    network.unmerge_adapter()
    assert bits(network) == weights


@variants
@families
def test_a_saved_adapter_computes_the_same_on_the_base_as_it_is(family, name, tmp_path):
    network = adapted(name, family)
    tokens = tiny.tokens()
    expected = logits(network, tokens)
    network.save_adapter("a", tmp_path)
    fresh = base(family)
    fresh.load_adapter("b", tmp_path)
    assert tiny.relative_error(logits(fresh, tokens), expected) < 1e-13  # √2 in alpha is rounded
    fresh.merge_adapter("b")
    assert tiny.relative_error(logits(fresh, tokens), expected) < 1e-13


@variants
def test_each_row_has_the_logits_and_gradients_of_its_own_adapter(name, device):
    network = adapted(name, device=device)
    network.add_adapter("b", config("lora"), seed=7)
    disturb(network, "b", seed=7)
    tokens, labels = tiny.labelled(3, 6)
    rows = ["b", "a", None]
    network.set_adapter(rows=rows)
    mixed = logits(network, tokens)
    for adapter in "ab":
        for layer in network._adapters.layers(adapter).values():
            layer.dropout = 0.0  # each pass would draw its own masks
    tiny.gradients(network, tokens, labels)
    together = {
        adapter: {k: ml.to_numpy(t.grad) for k, t in network.adapter_parameters(adapter).items() if t.requires_grad}
        for adapter in "ab"
    }
    for row, adapter in enumerate(rows):
        network.set_adapter(adapter)
        assert tiny.relative_error(mixed[row], logits(network, tokens[row : row + 1])[0]) < 1e-13
        if adapter is not None:
            _, alone = tiny.gradients(network, tokens[row : row + 1], labels[row : row + 1])
            for key, gradient in alone.items():
                assert tiny.relative_error(together[adapter][key], gradient) < 1e-12, key


@variants
def test_a_weighted_selection_is_the_weighted_sum_of_the_updates(name, device):
    network = adapted(name, device=device)
    network.add_adapter("b", config(name), seed=1)
    disturb(network, "b", seed=1)
    tokens, weights = tiny.tokens(), {"a": 0.7, "b": -1.5}
    before = {path: ml.to_numpy(linear.weight) for path, linear in network._adapters.linears.items()}
    expected = dict.fromkeys(before, 0.0)
    for adapter, weight in weights.items():
        network.merge_adapter(adapter)
        for path, linear in network._adapters.linears.items():
            expected[path] = expected[path] + weight * (ml.to_numpy(linear.weight) - before[path])
        network.unmerge_adapter()
    network.set_adapter(weights)
    together = logits(network, tokens)
    network.merge_adapter(weights)
    assert tiny.relative_error(logits(network, tokens), together) < 1e-13
    for path, linear in network._adapters.linears.items():
        assert tiny.relative_error(ml.to_numpy(linear.weight), before[path] + expected[path]) < 1e-13
    network.unmerge_adapter()
    network.set_adapter({"a": 0.5})
    half = logits(network, tokens)
    network.merge_adapter({"a": 0.5})
    assert tiny.relative_error(logits(network, tokens), half) < 1e-13


@variants
@pytest.mark.parametrize("rows", [False, True])
def test_checkpointing_changes_no_bit_of_a_gradient(name, rows, device):
    results = []
    for checkpoint in (False, True):
        network = adapted(name, device=device)
        network.checkpoint = checkpoint
        if rows:
            network.set_adapter(rows=["a", None])
        loss, gradients = tiny.gradients(network, tiny.tokens())
        results.append((loss, {key: gradient.tobytes() for key, gradient in gradients.items()}))
    assert results[0] == results[1]


@variants
def test_no_gradient_of_a_frozen_weight_is_taken(name, device):
    network = adapted(name, device=device)
    trained = set(network.parameters())
    assert trained <= set(network.adapter_parameters("a"))
    network.loss(tiny.tokens()).backward()
    assert all(parameter.grad is None for _, parameter in network.network.named_parameters())
    assert all((tensor.grad is not None) == (key in trained) for key, tensor in network.adapter_parameters("a").items())


@variants
def test_a_trained_weight_under_an_adapter_gets_its_gradient(name, device):
    """∂L/∂W of what is computed, the norm of DoRA held: against differences along a direction."""
    network = adapted(name, device=device)
    network.unfreeze(["layers.0.mlp.up_proj.weight"])
    linear = network._adapters.linears["model.layers.0.mlp.up_proj"]
    layer = network._adapters.layers("a")["model.layers.0.mlp.up_proj"]
    layer.dropout = 0.0
    for other in network._adapters.layers("a").values():
        other.dropout = 0.0
    with layer.constants_held(linear):
        reports = ml.gradcheck_parameters(lambda: network.loss(tiny.tokens()), {"W": linear.weight})
    reports["W"].raise_if_wrong()
    assert reports["W"].checked


@variants
def test_a_narrow_base_is_computed_with_in_float32(name):
    network = base(dtype="bfloat16")
    network.add_adapter("a", config(name, dropout=0.0))
    disturb(network, "a")
    wide = ml.new_model(tiny.llama(), dtype="float32")
    for (_, ours), (_, theirs) in zip(network.network.named_parameters(), wide.network.named_parameters(), strict=True):
        theirs.data = ours.data.astype(np.float32)
    wide.add_adapter("a", config(name, dropout=0.0))
    disturb(wide, "a")
    assert {tensor.dtype for tensor in network.adapter_parameters("a").values()} == {np.dtype("float32")}
    loss, gradients = tiny.gradients(network, tiny.tokens())
    expected, expected_gradients = tiny.gradients(wide, tiny.tokens())
    assert loss == pytest.approx(expected, rel=1e-5)
    for key, gradient in expected_gradients.items():
        assert tiny.relative_error(gradients[key], gradient) < 1e-4, key


class Compressed(CompressedWeight):
    """Stored as halves; knows its own products."""

    def __init__(self, weight: np.ndarray) -> None:
        self.half, self.shape, self.dtype = weight.astype(np.float32), weight.shape, weight.dtype
        self.storage = self.half

    def matmul(self, x):
        return x @ self.dense().T.astype(x.dtype)

    def matmul_t(self, g):
        return g @ self.dense().astype(g.dtype)

    def dense(self):
        return self.half.astype(self.dtype)


@variants
def test_a_compressed_base_computes_as_the_dense_one(name):
    results = []
    for compressed in (False, True):
        network = base()
        for linear in network._adapters.linears.values():
            stored = Compressed(linear.weight.data)
            linear.weight.data = stored if compressed else stored.dense()
        network.add_adapter("a", config(name, target_modules=["q_proj", "down_proj"]))
        disturb(network, "a")
        results.append((logits(network, tiny.tokens()), tiny.gradients(network, tiny.tokens())[1]))
    (dense, gradients), (stored, found) = results
    assert tiny.relative_error(stored, dense) < 1e-13
    for key, gradient in gradients.items():
        assert tiny.relative_error(found[key], gradient) < 1e-12, key


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True, "init": "pissa"}, "found use_dora=True and init='pissa', expected one of them"),
        ({"use_dora": True, "variant": "lora_fa"}, "found use_dora=True and variant='lora_fa', expected one"),
        ({"init": "pissa_niter_2", "variant": "lora_fa"}, "init='pissa_niter_2' and variant='lora_fa'"),
        ({"init": "pissa_niter_"}, "init is 'pissa_niter_', expected one of .* e.g. pissa_niter_4"),
        ({"init": "pissa_niter_N"}, "init is 'pissa_niter_N'"),
        ({"variant": None}, "variant is None, expected a variant's name"),
    ],
)
def test_what_does_not_combine_is_said(fields, message):
    with pytest.raises(MiniloraError, match=message):
        ml.LoraConfig(**fields)


WITHOUT_DROPOUT = [name for name in VARIANTS if "dropout" not in name]  # a GPU and a CPU draw other masks


def trained_step(network: ml.Model) -> ml.TrainStep:
    """LoRA+ gives each parameter its rate in one launch."""
    trained = network.parameters()
    return ml.TrainStep(network, ml.AdamW(trained, lr=1e-2, lr_scale=lora_plus(trained, 4.0)), max_grad_norm=1.0)


@pytest.mark.parametrize("name", WITHOUT_DROPOUT)
@families
def test_training_on_a_gpu_has_the_losses_of_the_cpu(family, name, device):
    """Recorded steps included."""
    if device == "cpu":
        pytest.skip("compares a GPU with the CPU (pytest --device cuda)")
    losses = []
    for place in ("cpu", device):
        network = base(family, "float32", place)
        network.add_adapter("a", config(name))
        step = trained_step(network)
        losses.append([float(step(*tiny.labelled(2, 9, seed=number % 2))) for number in range(6)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0][4] < 0.9 * losses[0][0]


def rounding_of_a_pass(layers: int) -> float:
    """The relative error of logits when every result on the way is rounded to bfloat16: each adds one of up to 2⁻⁹, of
    either sign, and a layer has about 8 (norms, q k v, attention, the three sums, the MLP's two).
    """
    return float(2**-9 * np.sqrt(8 * layers + 1))


@pytest.mark.parametrize("name", WITHOUT_DROPOUT)
@families
def test_a_bfloat16_step_on_a_gpu_is_the_float32_step_from_the_same_parameters(family, name, device):
    """Each step by itself: over some steps training blows a rounding of 1e-3 up to a tenth of the loss."""
    if device == "cpu":
        pytest.skip("activations are bfloat16 on a GPU only (pytest --device cuda)")
    network, twin = base(family, "bfloat16", device), base(family, "float32", device)
    for each in (network, twin):
        each.add_adapter("a", config(name))
    for (_, ours), (_, theirs) in zip(network.network.named_parameters(), twin.network.named_parameters(), strict=True):
        theirs.data = ours.data.astype(np.float32)
    step, losses = trained_step(network), []
    error = rounding_of_a_pass(network.config.num_hidden_layers)
    for number in range(6):
        batch = tiny.labelled(2, 9, seed=number % 2)
        for key, tensor in twin.parameters().items():
            tensor.data[...], tensor.grad = network.parameters()[key].data, None
        expected = twin.loss(*batch)
        expected.backward()
        losses.append(float(step(*batch)))
        logits = ml.to_numpy(twin.logits(batch[0]))
        assert abs(losses[-1] - float(expected)) < 3 * error * np.sqrt(np.mean(logits**2))
        found, wanted = (whole_gradient(each) for each in (network, twin))  # clipped, and not: compared as directions
        # A gradient passes all roundings twice, and is a product of what was rounded.
        assert tiny.relative_error(found, wanted) < 12 * error
    assert losses[4] < 0.9 * losses[0]


def whole_gradient(network: ml.Model) -> np.ndarray:
    """The gradients of all that is trained as one vector of length 1."""
    parts = [ml.to_numpy(tensor.grad).ravel() for tensor in network.parameters().values() if tensor.grad is not None]
    return np.concatenate(parts) / np.linalg.norm(np.concatenate(parts))


# --- DoRA -------------------------------------------------------------------------------------------------------------


def dora_layer(weight: np.ndarray, lora_A: np.ndarray, lora_B: np.ndarray, alpha: float = 6):
    """A Linear with a DoRA adapter, and its layer."""
    network = ml.new_model(tiny.llama(), dtype=str(weight.dtype))
    linear = network._adapters.linears["model.layers.0.mlp.up_proj"]
    linear.weight.data = weight
    network.add_adapter("a", ml.LoraConfig(r=len(lora_A), alpha=alpha, use_dora=True, target_modules=["0.mlp.up_proj"]))
    layer = linear.adapter.layers["a"]
    layer.lora_A.data, layer.lora_B.data = lora_A, lora_B
    return linear, layer


@pytest.mark.parametrize("alpha", [6, -4, 0.5])
def test_the_norm_is_that_of_the_rows_of_W_plus_its_update(alpha):
    random = np.random.default_rng(0)
    W, A, B = random.normal(size=(40, 24)), random.normal(size=(3, 24)), random.normal(size=(40, 3))
    linear, layer = dora_layer(W, A, B, alpha)
    assert tiny.relative_error(layer.norm(linear), np.linalg.norm(W + layer.scale * B @ A, axis=1)) < 1e-14


@pytest.mark.parametrize("left", [0.1, 0.01])
def test_the_norm_keeps_the_digits_that_cancellation_leaves(left):
    """V_i = left · W_i, all but cancelled: the error of n² is about ε / left², in float32."""
    random = np.random.default_rng(1)
    W = (random.normal(size=(40, 3)) @ random.normal(size=(3, 24))).astype(np.float32)
    U, S, A = np.linalg.svd(W, full_matrices=False)
    A, B = A[:3], -(1 - left) / 2 * (U * S)[:, :3]
    linear, layer = dora_layer(W, A, B)
    exact = np.linalg.norm(W.astype(np.float64) + 2.0 * B.astype(np.float64) @ A, axis=1)
    errors = np.abs(layer.norm(linear) / exact - 1)
    assert errors.max() < 4 * np.finfo(np.float32).eps / left**2


def test_rows_that_are_zero_or_cancel_divide_by_no_zero():
    random = np.random.default_rng(2)
    W = random.normal(size=(40, 24)).astype(np.float32)
    W[3] = 0
    linear, layer = dora_layer(W, np.zeros((1, 24), np.float32), np.zeros((40, 1), np.float32))
    layer.lora_A.data[0] = W[7]
    layer.lora_B.data[7] = -1 / layer.scale  # V_7 = 0
    x = ml.Tensor(random.normal(size=(5, 24)).astype(np.float32), requires_grad=True)
    y = linear(x)
    y.backward(np.ones_like(y.data))
    for tensor in (x, *layer.parameters().values()):
        assert np.isfinite(tensor.grad).all()
    assert np.isfinite(y.data).all()
    assert not y.data[:, 3].any()
    assert np.isfinite(layer.delta(W)).all()


def test_the_norms_of_a_frozen_weight_are_made_once_and_of_a_trained_one_each_time():
    network = adapted("dora")
    path = "model.layers.0.mlp.up_proj"
    linear, layer = network._adapters.linears[path], network._adapters.layers("a")[path]
    layer.norm(linear)
    kept = layer.base_squares
    assert layer.norm(linear) is not layer.norm(linear)
    assert layer.base_squares is kept
    network.unfreeze([f"{path}.weight"])
    layer.norm(linear)
    linear.weight.data *= 2  # in place, as an optimiser does it
    direct = linear.weight.data + layer.scale * layer.lora_B.data @ layer.lora_A.data
    assert tiny.relative_error(layer.norm(linear), np.linalg.norm(direct, axis=1)) < 1e-14


def test_generating_reads_W_once_and_notices_what_training_changed_in_place():
    network = adapted("dora")
    path = "model.layers.0.mlp.up_proj"
    linear, layer = network._adapters.linears[path], network._adapters.layers("a")[path]
    with ml.no_grad():
        first = layer.norm(linear)
        assert layer.norm(linear) is first
        for tensor in (layer.lora_A, layer.lora_B):
            tensor.data *= 1.5
            direct = linear.weight.data + layer.scale * layer.lora_B.data @ layer.lora_A.data
            assert tiny.relative_error(layer.norm(linear), np.linalg.norm(direct, axis=1)) < 1e-14
        linear.weight.data = 2 * linear.weight.data
        assert tiny.relative_error(layer.norm(linear), first) > 0.1


def test_the_rows_of_a_merged_weight_have_the_magnitudes_for_norms():
    network = adapted("dora", "gpt2")
    layers = network._adapters.layers("a")
    network.merge_adapter("a")
    for path, layer in layers.items():
        found = np.linalg.norm(network._adapters.linears[path].weight.data, axis=1)
        assert tiny.relative_error(found, np.abs(layer.magnitude.data)) < 1e-13


@families
def test_dora_s_gradients_are_projections_of_the_merged_weight_s(family, device):
    """With dW' from unfreezing the merged base and c = m / n: dB = s (c ⊙ dW') Aᵀ, dA = s Bᵀ (c ⊙ dW'), and
    dm = Σ dW' ⊙ V / n over the inputs."""
    network = adapted("dora", family, device)
    batch = tiny.labelled(2, 6)
    _, found = tiny.gradients(network, *batch)
    layers = network._adapters.layers("a")
    directions = {}
    for path, layer in layers.items():
        W, A, B = (ml.to_numpy(t) for t in (network._adapters.linears[path].weight, layer.lora_A, layer.lora_B))
        directions[path] = W + layer.scale * B @ A
    network.merge_adapter("a")
    network.unfreeze([f"{path}.weight" for path in layers])
    network.loss(*batch).backward()
    for path, layer in layers.items():
        V = directions[path]
        n = np.linalg.norm(V, axis=1)
        dW = ml.to_numpy(network._adapters.linears[path].weight.grad)
        dV = (ml.to_numpy(layer.magnitude) / n)[:, None] * dW
        expected = {
            "lora_A.weight": layer.scale * ml.to_numpy(layer.lora_B).T @ dV,
            "lora_B.weight": layer.scale * dV @ ml.to_numpy(layer.lora_A).T,
            "lora_magnitude_vector": (dW * V).sum(axis=1) / n,
        }
        for part, gradient in expected.items():
            assert tiny.relative_error(found[f"base_model.model.{path}.{part}"], gradient) < 1e-11, (path, part)


def test_differences_that_let_the_norm_follow_disagree():
    """So the check would notice a backward that differentiates the norm, or one that should."""
    network = adapted("dora")
    parameters = {key: value for key, value in network.adapter_parameters("a").items() if "0.mlp.up_proj.lora_B" in key}
    reports = ml.gradcheck_parameters(lambda: network.loss(tiny.tokens()), parameters)
    assert any(report.wrong for report in reports.values())


def test_magnitudes_alone_scale_the_outputs():
    random = np.random.default_rng(3)
    W = random.normal(size=(40, 24))
    linear, layer = dora_layer(W, random.normal(size=(2, 24)), np.zeros((40, 2)))
    x = random.normal(size=(5, 24))
    layer.magnitude.data = 3 * layer.magnitude.data
    assert tiny.relative_error(linear(ml.Tensor(x)), 3 * x @ W.T) < 1e-15


def test_a_dora_adapter_has_no_factors_to_be_combined():
    layer = next(iter(adapted("dora")._adapters.layers("a").values()))
    with pytest.raises(MiniloraError, match="ΔW has full rank, expected one of two low-rank factors: apply"):
        layer.factors()


def test_the_saved_key_is_peft_s(tmp_path):
    network = adapted("dora")
    network.save_adapter("a", tmp_path)
    _, values = network._adapters.saved("a")
    prefix = "base_model.model.model.layers.0.self_attn.k_proj"
    assert values[f"{prefix}.lora_magnitude_vector"].shape == (16,)
    assert set(values) == set(network.adapter_parameters("a"))


# --- PiSSA ------------------------------------------------------------------------------------------------------------


def decaying(random: np.random.Generator, outside: int = 40, inside: int = 24) -> np.ndarray:
    """A matrix whose singular values fall as those of trained weights do: slowly, without a gap."""
    left, _ = np.linalg.qr(random.normal(size=(outside, inside)))
    right, _ = np.linalg.qr(random.normal(size=(inside, inside)))
    return (left / np.arange(1, inside + 1) ** 0.5) @ right.T


@pytest.mark.parametrize("name", ["pissa", "pissa, negative alpha, dropout"])
@families
def test_s_B_A_starts_as_the_best_approximation_of_that_rank(name, family):
    network = base(family)
    network.add_adapter("a", config(name))
    for path, layer in network._adapters.layers("a").items():
        W = network._adapters.linears[path].weight.data
        rest = W - layer.scale * layer.lora_B.data @ layer.lora_A.data
        values = np.linalg.svd(W, compute_uv=False)
        assert np.linalg.norm(rest) == pytest.approx(np.sqrt((values[3:] ** 2).sum()), rel=1e-12)
        assert tiny.relative_error(np.linalg.svd(rest, compute_uv=False)[:-3], values[3:]) < 1e-12
        sizes = np.linalg.norm(layer.lora_A.data, axis=1), np.linalg.norm(layer.lora_B.data, axis=0)
        assert tiny.relative_error(*sizes) < 1e-12  # √(σ / |s|) on either side


def test_both_factors_have_a_gradient_at_the_start():
    network = base()
    network.add_adapter("a", config("pissa"))
    _, gradients = tiny.gradients(network, tiny.tokens())
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_power_iterations_come_close_to_the_largest_singular_values(iterations):
    W = decaying(np.random.default_rng(0), 200, 150)
    U, S, Vt = singular_triplets(W, 8, W.dtype, iterations)
    assert (U.shape, S.shape, Vt.shape) == ((200, 8), (8,), (8, 150))
    exact = np.linalg.svd(W, compute_uv=False)
    rest, best = np.linalg.norm(W - U * S @ Vt), np.sqrt((exact[8:] ** 2).sum())
    assert 1 - 1e-12 < rest / best < {0: 1.15, 1: 1.02, 4: 1.0005}[iterations]
    assert tiny.relative_error(U.T @ U, np.eye(8)) < 1e-13
    assert tiny.relative_error(Vt @ Vt.T, np.eye(8)) < 1e-13
    again = singular_triplets(W, 8, W.dtype, iterations)
    assert all(np.array_equal(a, b) for a, b in zip((U, S, Vt), again, strict=True))


def test_a_pissa_adapter_sits_beside_others_on_one_base():
    network = base()
    tokens = tiny.tokens()
    tiny.add_random_adapter(network, "plain", seed=4)
    expected = logits(network, tokens)
    network.add_adapter("pissa", config("pissa"))
    disturb(network, "pissa")
    network.set_adapter("plain")
    assert np.array_equal(logits(network, tokens), expected)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_it_is_saved_as_plain_lora_of_twice_the_rank_at_the_same_scale(use_rslora):
    patterned = ml.LoraConfig(
        r=2, alpha=4, init="pissa", use_rslora=use_rslora, target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 5}, alpha_pattern={"q_proj": 3},
    )  # fmt: skip
    network = base()
    network.add_adapter("a", patterned)
    saved, values = network._adapters.saved("a")
    assert (saved.init, saved.variant, saved.r) == ("kaiming", "lora", 4)
    loaded = base()
    loaded._adapters.add("b", saved, values=values)
    for path, layer in network._adapters.layers("a").items():
        other = loaded._adapters.layers("b")[path]
        assert other.rank == 2 * layer.rank
        assert other.scale == pytest.approx(layer.scale, rel=1e-15)
        assert np.array_equal(other.lora_A.data[: layer.rank], layer.lora_A.data)


def test_dropout_is_on_what_is_trained_and_not_on_what_is_subtracted():
    """As in PEFT, where W_res x knows no dropout."""
    network = base()
    network.add_adapter("a", config("pissa, negative alpha, dropout"))
    disturb(network, "a")
    path = "model.layers.0.mlp.up_proj"
    linear, layer = network._adapters.linears[path], network._adapters.layers("a")[path]
    random = np.random.default_rng(0)
    x, dropped = random.normal(size=(5, 24)), random.normal(size=(5, 24))
    found = layer.update(linear, ml.Tensor(x), ml.Tensor(dropped), 0.5)
    A, B = layer.lora_A.data, layer.lora_B.data
    expected = 0.5 * layer.scale * (dropped @ A.T @ B.T - x @ layer.start_A.T @ layer.start_B.T)
    assert tiny.relative_error(found, expected) < 1e-13


@pytest.mark.parametrize(
    ("fields", "message"), [({"r": 17}, "takes 17 .* a rank of at most 16"), ({"alpha": 0}, "an alpha that is not 0")]
)
def test_what_pissa_cannot_start_from_is_said(fields, message):
    network = base()
    with pytest.raises(MiniloraError, match=message):
        network.add_adapter("a", config("pissa", **fields))
    assert network.adapters == {}


# --- LoRA-FA ----------------------------------------------------------------------------------------------------------


def test_lora_fa_trains_B_only_with_the_gradient_that_lora_has():
    plain, frozen = base(), base()
    for network, name in ((plain, "lora"), (frozen, "lora_fa")):
        network.add_adapter("a", config(name))
        for key, tensor in network.adapter_parameters("a").items():
            if "lora_B" in key:
                tensor.data[...] = np.random.default_rng(1).normal(0, 0.2, tensor.shape)
    loss, gradients = tiny.gradients(frozen, tiny.tokens())
    expected, all_gradients = tiny.gradients(plain, tiny.tokens())
    assert loss == expected
    assert gradients.keys() == {key for key in all_gradients if "lora_B" in key}
    for key, gradient in gradients.items():
        assert tiny.relative_error(gradient, all_gradients[key]) < 1e-13


@pytest.mark.parametrize("kernels", [nullcontext, definitions_only])
@pytest.mark.parametrize(("name", "keeps"), [("lora", True), ("dora", True), ("pissa", True), ("lora_fa", False)])
def test_backward_of_lora_fa_keeps_no_input(name, keeps, kernels):
    """The input is gone as soon as forward is done, and backward has what it needs all the same."""
    network = adapted(name)
    linear = network._adapters.linears["model.layers.0.mlp.down_proj"]
    x = np.random.default_rng(0).normal(size=(30, 40))
    held = weakref.ref(x)
    with kernels():
        y = linear(ml.Tensor(x))
        del x
        gc.collect()
        assert (held() is not None) == keeps
        y.backward(np.ones(y.shape))
    assert linear.adapter.layers["a"].lora_B.grad.any()


# --- LoRA+ ------------------------------------------------------------------------------------------------------------


def test_the_ratio_goes_to_B_and_to_vectors():
    network = base()
    network.add_adapter("a", config("dora", target_modules=["q_proj"]))
    scale = lora_plus(network.parameters(), 16.0)
    ends = {name.partition("q_proj.")[2]: factor for name, factor in scale.items()}
    assert ends == {"lora_B.weight": 16.0, "lora_magnitude_vector": 16.0}


def test_a_ratio_without_an_adapter_is_refused():
    network = base()
    network.unfreeze(["norm.weight"])
    with pytest.raises(MiniloraError, match="LoRA\\+ found no lora_B among what is trained"):
        lora_plus(network.parameters(), 16.0)


def test_a_step_with_a_ratio_is_one_with_that_rate_for_B_alone():
    results = []
    for together in (True, False):
        network = adapted("lora")
        parameters = network.parameters()
        tiny.gradients(network, tiny.tokens())
        if together:
            ml.AdamW(parameters, lr=1e-2, weight_decay=0.1, lr_scale=lora_plus(parameters, 8.0)).step()
        else:
            for part, rate in (("lora_A", 1e-2), ("lora_B", 8e-2)):
                ml.AdamW({k: v for k, v in parameters.items() if part in k}, lr=rate, weight_decay=0.1).step()
        results.append({key: tensor.data.tobytes() for key, tensor in parameters.items()})
    assert results[0] == results[1]


@pytest.mark.parametrize("scale", [{"nobody": 2.0}, {"0": -1.0}, {"0": float("nan")}])
def test_a_rate_that_cannot_be_meant_is_refused(scale):
    with pytest.raises(MiniloraError, match=r"lr_scale has .* expected a trained parameter's name and a factor"):
        ml.AdamW([ml.Tensor(np.ones(2), requires_grad=True)], lr_scale=scale)
