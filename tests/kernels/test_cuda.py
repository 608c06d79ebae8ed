"""Every GPU kernel is its definition: in bfloat16, float16 and float32, on sizes of real layers and on ragged ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from minilora import ops
from minilora.backend import array_module, dtype_of, matmul, to_device, to_numpy
from minilora.execution import one_pass
from minilora.nn import Linear, Module
from minilora.optim import Adam, AdamW, clip_grad_norm, global_norm
from minilora.tensor import PRIMITIVES, Tensor, backward, definitions_only

BOUNDS = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 2e-5}  # ‖found − expected‖ / ‖expected‖
DTYPES = tuple(BOUNDS)


@pytest.fixture(autouse=True)
def gpu(device):
    if device == "cpu":
        pytest.skip("needs --device cuda")


@dataclass
class Arguments:
    """inputs: arrays in the activations' dtype; those at the places in `wide` are float32 (adapters)."""

    inputs: list[Any]
    options: dict[str, Any]
    wide: tuple[int, ...] = ()
    frozen: tuple[int, ...] = ()


def run(name: str, arguments: Arguments, dtype: str, device: str, cotangents: list[np.ndarray]):
    """Values and gradients as float64 NumPy arrays, of the kernel, or of the definition where dtype is float64."""
    leaves = []
    for place, value in enumerate(arguments.inputs):
        if value is None:
            leaves.append(None)
            continue
        own = "float32" if place in arguments.wide and dtype != "float64" else dtype
        array = to_device(value.astype(dtype_of(own)), device)
        leaves.append(Tensor(array, requires_grad=place not in arguments.frozen and dtype == "float64"))
        if place not in arguments.frozen:
            leaves[-1].trained = True
    options = {
        key: to_device(value, device) if isinstance(value, np.ndarray) else value
        for key, value in arguments.options.items()
    }
    if dtype != "float64":
        assert PRIMITIVES[name].has_kernel_for(*leaves, **options), f"no kernel of {name} for {dtype}"
    result = PRIMITIVES[name](*leaves, **options)
    outputs = list(result) if isinstance(result, tuple) else [result]
    grads = [to_device(c.astype(output.dtype), device) for c, output in zip(cotangents, outputs, strict=True)]
    backward(outputs, grads)
    values = [to_numpy(output.data).astype(np.float64) for output in outputs]
    gradients = [
        None if leaf is None or leaf.grad is None else to_numpy(leaf.grad).astype(np.float64) for leaf in leaves
    ]
    return values, gradients


def rounded(value: np.ndarray | None, dtype: str) -> np.ndarray | None:
    return None if value is None else value.astype(dtype_of(dtype)).astype(np.float64)


def check(name: str, arguments: Arguments, dtype: str, device: str, outputs: list[tuple[int, ...]]) -> None:
    """The kernel on values that `dtype` can hold, against the definition in float64 on the same values."""
    rng = np.random.default_rng(3)
    cotangents = [rounded(rng.standard_normal(shape), dtype) for shape in outputs]
    inputs = [
        rounded(value, "float32" if place in arguments.wide else dtype) for place, value in enumerate(arguments.inputs)
    ]
    arguments = Arguments(inputs, arguments.options, arguments.wide, arguments.frozen)
    found = run(name, arguments, dtype, device, cotangents)
    with definitions_only():
        expected = run(name, arguments, "float64", device, cotangents)
    for kind, ours, theirs in zip(("value", "gradient"), found, expected, strict=True):
        for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert (a is None) == (b is None), f"{name}: {kind} {place} is {'missing' if a is None else 'unexpected'}"
            if a is not None:
                error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
                assert error <= BOUNDS[dtype], f"{name} in {dtype}: {kind} {place} is off by {error:.2g}"
    again = run(name, arguments, dtype, device, cotangents)
    for ours, once_more in zip(found, again, strict=True):
        for a, b in zip(ours, once_more, strict=True):
            assert a is None or np.array_equal(a, b), f"{name} gives other bits the second time"


rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 64), (37, 576), (5, 768), (4, 2048), (3, 4096), (2, 8192)])
@pytest.mark.parametrize("delta", [False, True])
def test_norms_with_a_residual_are_their_definitions(shape, dtype, delta, device):
    width = shape[-1]
    added = normal(*shape) if delta else None
    options = {"eps": 1e-5}
    check("add_rms_norm", Arguments([normal(*shape), added, normal(width)], options), dtype, device, [shape] * 2)
    inputs = [normal(*shape) + 0.5, added, normal(width), normal(width)]
    check("add_layer_norm", Arguments(inputs, options), dtype, device, [shape] * 2)
    if not delta:
        check("rms_norm", Arguments([normal(*shape), normal(width)], options), dtype, device, [shape])
        check("layer_norm", Arguments([normal(*shape), normal(width), normal(width)], options), dtype, device, [shape])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8,), (3, 8), (7, 11, 1536), (4, 11008)])
def test_activations_and_sums_are_their_definitions(shape, dtype, device):
    if len(shape) > 1:
        side_by_side(shape, dtype, device)
    check("silu_mul", Arguments([4 * normal(*shape), normal(*shape)], {}), dtype, device, [shape])
    check("gelu_tanh", Arguments([3 * normal(*shape)], {}), dtype, device, [shape])
    check("add", Arguments([normal(*shape), normal(*shape)], {}), dtype, device, [shape])


def side_by_side(shape: tuple[int, ...], dtype: str, device: str) -> None:
    """silu_mul of two halves of one matrix, as layers that were taken together give them, is that of two arrays."""
    both = to_device(normal(*shape[:-1], 2 * shape[-1]).astype(dtype_of(dtype)), device)
    halves = both[..., : shape[-1]], both[..., shape[-1] :]
    xp, dh = array_module(both), to_device(normal(*shape).astype(dtype_of(dtype)), device)
    results = []
    for pair in (halves, [xp.ascontiguousarray(half) for half in halves]):
        leaves = [Tensor(half, requires_grad=True) for half in pair]
        assert ops.silu_mul.has_kernel_for(*leaves)
        h = ops.silu_mul(*leaves)
        h.backward(dh)
        results.append([to_numpy(h), *(to_numpy(leaf.grad) for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("heads", "width"), [(9, 64), (2, 128), (3, 16)])
def test_rotary_is_its_definition(heads, width, rows, dtype, device):
    angle = rng.uniform(-3, 3, (rows, 29, 1, width // 2))
    options = {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
    shape = (2, 29, heads, width)
    check("rotary", Arguments([normal(*shape)], options), dtype, device, [shape])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("count", "inside", "outside", "rank"), [(1, 64, 32, 8), (203, 576, 192, 8), (64, 192, 576, 4)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_lora_is_its_definition(count, inside, outside, rank, bias, dtype, device):
    inputs = [
        normal(count, inside), normal(outside, inside) / 20, normal(outside) if bias else None,
        normal(rank, inside) / 20, normal(outside, rank),
    ]  # fmt: skip
    check("lora_linear", Arguments(inputs, {"scale": 2.0}, wide=(3, 4), frozen=(1,)), dtype, device, [(count, outside)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("count", "inside", "outside"), [(1, 64, 32), (203, 576, 192)])
def test_a_linear_layer_is_its_definition(count, inside, outside, frozen, dtype, device):
    inputs = [normal(count, inside), normal(outside, inside) / 20, normal(outside)]
    places = (1, 2) if frozen else ()
    check("linear", Arguments(inputs, {}, wide=(1, 2), frozen=places), dtype, device, [(count, outside)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_gradient_of_a_float32_weight_is_not_rounded_to_the_activations(dtype, device):
    """A weight whose values the activations' dtype has: then only rounding dW itself could show."""
    random = np.random.default_rng(4)
    x, W, dy = (random.standard_normal(shape).astype(dtype_of(dtype)) for shape in ((512, 64), (32, 64), (512, 32)))
    weight = Tensor(to_device(W.astype(np.float32), device), requires_grad=True)
    ops.linear(Tensor(to_device(x, device)), weight).backward(to_device(dy, device))
    expected = dy.astype(np.float64).T @ x.astype(np.float64)
    assert np.linalg.norm(to_numpy(weight.grad) - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("join", [True, False])
@pytest.mark.parametrize("ranks", [(8, 8, 8), (8, 0, 16), (8, 8)])
def test_layers_whose_weights_lie_together_are_the_same_layers_apart(ranks, join, dtype, device, monkeypatch):
    if not join:
        monkeypatch.setattr(cuda_linear(), "JOIN_BELOW", 0)
    random = np.random.default_rng(5)

    def array(kind, *shape):
        return to_device(random.standard_normal(shape).astype(dtype_of(kind)), device)

    outs = [64 * (index + 1) for index in range(len(ranks))]
    whole, x = array(dtype, sum(outs), 128), array(dtype, 3, 25, 128)
    starts = np.cumsum([0, *outs])
    dys = [array(dtype, 3, 25, out) for out in outs]
    factors = [
        (array("float32", rank, 128), array("float32", out, rank)) if rank else None
        for rank, out in zip(ranks, outs, strict=True)
    ]
    results = []
    for together in (True, False):
        leaves, inputs = [Tensor(x, requires_grad=True)], []
        for start, stop, pair in zip(starts[:-1], starts[1:], factors, strict=True):
            weight = whole[start:stop]
            own = [None, None] if pair is None else [Tensor(factor, requires_grad=True) for factor in pair]
            leaves += [tensor for tensor in own if tensor is not None]
            inputs += [Tensor(weight if together else weight.copy()), None, *own]
        for _ in range(3):  # the first pass registers the group, later ones round it in place
            for leaf in leaves:
                leaf.grad = None
            with one_pass(PASSES[together]):
                ys = ops.lora_linears(leaves[0], *inputs, scales=(0.5,) * len(ranks))
            backward(ys, dys)
        results.append(
            [to_numpy(y).astype(np.float64) for y in ys] + [to_numpy(leaf.grad).astype(np.float64) for leaf in leaves]
        )
    for ours, theirs in zip(*results, strict=True):
        assert np.linalg.norm(ours - theirs) <= BOUNDS[dtype] * np.linalg.norm(theirs)


PASSES = [Module(), Module()]  # anything that passes can be told apart by


def cuda_linear() -> Any:
    from minilora.kernels.cuda import linear

    return linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [(8, 8, 8), (8, 0, 16), (0, 0), (4, 1, 3)])
def test_layers_that_read_one_input_are_their_definitions(ranks, dtype, device):
    count, inside = 75, 128
    inputs: list[Any] = [normal(count, inside)]
    outputs = []
    for index, rank in enumerate(ranks):
        outside = 64 * (index + 1)
        factors = [normal(rank, inside) / 10, normal(outside, rank)] if rank else [None, None]
        inputs += [normal(outside, inside) / 10, normal(outside) if index == 1 else None, *factors]
        outputs.append((count, outside))
    places = [4 * index + offset for index in range(len(ranks)) for offset in (3, 4)]
    frozen = tuple(4 * index + 1 for index in range(len(ranks)))
    arguments = Arguments(inputs, {"scales": (2.0, 0.5, -1.0)[: len(ranks)]}, tuple(places), frozen)
    check("lora_linears", arguments, dtype, device, outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "vocabulary"), [(1, 40), (203, 5000), (700, 49152)])
def test_cross_entropy_through_the_head_is_its_definition(count, vocabulary, dtype, device):
    labels = rng.integers(0, vocabulary, count)
    weights = rng.uniform(0, 2 / count, count).astype(np.float32)
    weights[count // 2 :: 7] = 0
    arguments = Arguments(
        [normal(count, 64), normal(vocabulary, 64)], {"labels": labels, "weights": weights}, frozen=(1,)
    )
    check("linear_cross_entropy", arguments, dtype, device, [()])


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_products_take_any_views(dtype, device):
    """Transposed, sliced, broadcast and batched operands, and results that are views."""

    def array(*shape):
        return to_device(normal(*shape).astype(dtype_of(dtype)), device)

    xp = array_module(array(1))

    def wide(x):
        return x.astype(np.float64)

    bound = {"float64": 1e-13}.get(dtype, BOUNDS.get(dtype))
    a, b = array(33, 40), array(24, 40)
    stacked = array(3, 5, 33, 40)
    pairs = [
        (a, b.T), (a[:, 8:24], b[:, 8:24].T), (a[::2], b.T), (a.T, array(33, 7)), (a[:1], b.T), (a, array(40, 1)),
        (array(1, 40), array(40, 1)), (a[:, ::3], array(14, 8)), (stacked, array(40, 16)),
        (stacked, stacked.swapaxes(-1, -2)),
        (stacked.transpose(1, 0, 2, 3), array(3, 40, 8)), (stacked[:, :1], stacked[:1].swapaxes(-1, -2)), (a[:0], b.T),
    ]  # fmt: skip
    for number, (left, right) in enumerate(pairs):
        found, expected = matmul(left, right), xp.matmul(wide(left), wide(right))
        assert found.shape == expected.shape
        error = float(xp.linalg.norm(wide(found) - expected)) / max(float(xp.linalg.norm(expected)), 1e-30)
        assert error <= bound, f"pair {number} is off by {error:.2g}"
    room = xp.zeros((33, 48), a.dtype)
    matmul(a, b.T, out=room[:, 8:32])
    expected = xp.matmul(wide(a), wide(b.T))
    assert float(xp.linalg.norm(wide(room[:, 8:32]) - expected) / xp.linalg.norm(expected)) <= bound
    assert not room[:, :8].any()
    assert not room[:, 32:].any()


def trained(device: str, seed: int) -> dict[str, Tensor]:
    random = np.random.default_rng(seed)
    shapes = [(8, 576), (192, 8), (5000, 3), (1,), (4096,), (7, 13)]
    tensors = {}
    for number, shape in enumerate(shapes):
        tensor = Tensor(to_device(random.standard_normal(shape).astype(np.float32), device), requires_grad=True)
        tensor.grad = to_device(random.standard_normal(shape).astype(np.float32), device)
        tensors[str(number)] = tensor
    tensors["none"] = Tensor(to_device(np.ones(3, np.float32), device), requires_grad=True)
    return tensors


@pytest.mark.parametrize("dtype", DTYPES)
def test_q_k_and_v_of_one_array_are_taken_apart_and_put_together(dtype, device):
    shape = (2, 7, 3, 2, 64)
    parts = [(2, 7, 2, 64)] * 3
    check("unstack", Arguments([normal(*shape)], {"axis": 2}), dtype, device, parts)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(("count", "rows", "width"), [(1, 5, 3), (700, 9, 300), (4096, 50257, 768), (513, 1, 8)])
def test_the_gradient_of_a_lookup_has_the_bits_of_additions_in_order(count, rows, width, dtype, device):
    random = np.random.default_rng(2)
    tokens = random.integers(0, rows, (1, count))
    dy = random.standard_normal((1, count, width)).astype(dtype_of(dtype))
    wide = dtype_of("float32" if dtype == "bfloat16" else dtype)
    expected = np.zeros((rows, width), wide)
    np.add.at(expected, tokens[0], dy[0].astype(wide))
    weight = Tensor(to_device(random.standard_normal((rows, width)).astype(dtype_of(dtype)), device))
    weight.trained = True
    options = {"tokens": to_device(tokens, device), "dtype": None}
    assert ops.embedding.has_kernel_for(weight, **options)
    y = ops.embedding(weight, **options)
    assert np.array_equal(to_numpy(y), to_numpy(weight)[tokens])
    y.backward(to_device(dy, device))
    assert np.array_equal(to_numpy(weight.grad), expected.astype(dtype_of(dtype)))


@pytest.mark.parametrize("kind", [AdamW, Adam])
def test_one_launch_for_all_adapters_does_what_a_launch_each_does(kind, device):
    """The optimiser, the norm and clipping on the GPU beside the same on the CPU."""
    results = []
    for place in (device, "cpu"):
        parameters = trained(place, 1)
        optimiser = kind(parameters, lr=1e-2, weight_decay=0.1)
        norms = []
        for step in range(4):
            for name, tensor in trained(place, step).items():
                if name == "0" and tensor.grad is not None:  # columns of a wider matrix
                    tensor.grad = array_module(tensor.grad).concatenate([tensor.grad] * 2, axis=1)[:, :576]
                parameters[name].grad = None if name == "2" and step == 1 else tensor.grad
            norms.append(float(global_norm(parameters)))
            assert float(clip_grad_norm(parameters, 1.0)) == norms[-1]
            norms.append(float(global_norm(parameters)))
            optimiser.step()
        results.append((norms, [to_numpy(tensor) for tensor in parameters.values()]))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-6)


def test_adapters_are_rounded_once_in_a_pass_and_anew_in_the_next(device):
    x, W = (Tensor(to_device(normal(*shape).astype(dtype_of("bfloat16")), device)) for shape in ((16, 64), (32, 64)))
    A, B = (
        Tensor(to_device(normal(*shape).astype(np.float32), device), requires_grad=True) for shape in ((8, 64), (32, 8))
    )

    network = Linear(W)

    def forward() -> np.ndarray:
        with one_pass(network):
            first = ops.lora_linear(x, W, None, A, B, scale=1.0)
            assert np.array_equal(to_numpy(first), to_numpy(ops.lora_linear(x, W, None, A, B, scale=1.0)))
        return to_numpy(first).astype(np.float32)

    def expected() -> np.ndarray:
        return to_numpy(ops.lora_linear(x, W, None, A, B, scale=1.0)).astype(np.float32)

    for _ in range(3):
        np.testing.assert_array_equal(forward(), expected())
        B.data *= 1.5
        A.data += 0.25
