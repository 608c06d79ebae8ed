"""Each rule against its primitive: what is made, and what the closure of its vjp keeps, byte for byte."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minilora import ops
from minilora.kernels.cpu import memory
from minilora.plan.rules import Rules
from minilora.plan.shapes import Ledger, ShapeArray
from minilora.tensor import PRIMITIVES

N, D, OUT, RANK, HEADS, WIDTH, VOCABULARY = 512, 192, 320, 4, 4, 48, 700
SMALL = 64 * 1024  # bytes: statistics, copies of A and B


def kept_bytes(vjp: Callable, parameters: tuple[int, ...]) -> int:
    """Bytes of the memory that arrays in a closure lie in, less that of the parameters (by id)."""
    owners: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in seen or id(value) in parameters:
            return
        seen.add(id(value))
        if isinstance(value, np.ndarray):
            owner, nbytes = value, value.nbytes
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            if id(owner) in parameters:
                return
            whole = 0 if owner.dtype == np.uint8 else owner.nbytes  # a reused buffer may be longer than its array
            owners[id(owner)] = max(owners.get(id(owner), 0), nbytes, whole)
        elif isinstance(value, types.FunctionType):
            for cell in value.__closure__ or ():
                visit(cell.cell_contents)
            for default in value.__defaults__ or ():
                visit(default)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif type(value).__module__.startswith("minilora.kernels"):
            for item in vars(value).values():
                visit(item)

    visit(vjp)
    return sum(owners.values())


def real(*shape: int) -> np.ndarray:
    """An array as a kernel's result is: in a reused buffer."""
    array = memory.empty(shape, np.dtype(np.float32))
    array[...] = np.random.default_rng(sum(shape)).normal(size=shape)
    return array


class Both:
    """The same call in arrays and in shapes. inputs: their shapes; parameters: positions of weights; others: as is."""

    def __init__(self, name: str, *inputs: Any, parameters: tuple[int, ...] = (), **options: Any) -> None:
        self.name, self.inputs, self.parameters, self.options = name, inputs, parameters, options

    def in_arrays(self) -> tuple[list[tuple[int, ...]], int]:
        arrays = [real(*shape) if isinstance(shape, tuple) else shape for shape in self.inputs]
        primitive = PRIMITIVES[self.name]
        outputs, vjp = primitive.implementation(arrays, without_needs(self.options))(*arrays, **self.options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        held = tuple(id(arrays[position]) for position in self.parameters)
        held += tuple(id(arrays[position].base) for position in self.parameters if arrays[position].base is not None)
        held += tuple(id(value) for value in self.options.values())  # tables that all layers share
        return [output.shape for output in outputs], kept_bytes(vjp, held)

    def in_shapes(self) -> tuple[list[tuple[int, ...]], int]:
        ledger = Ledger()
        arrays = []
        for position, shape in enumerate(self.inputs):
            if not isinstance(shape, tuple):
                arrays.append(shape)
            elif position in self.parameters:
                arrays.append(ShapeArray(shape, np.float32))
            else:
                arrays.append(ShapeArray.taken(ledger, shape, np.float32, pooled=True))
        outputs, vjp = getattr(Rules(ledger), self.name)(*arrays, **self.options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        shapes = [output.shape for output in outputs]
        del arrays, outputs
        kept = ledger.alive
        assert vjp is not None
        return shapes, kept


def without_needs(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "needs"}


index = np.arange(0, N, 2)
labels, weights = np.zeros(N, np.int64), np.ones(N, np.float32)
angles = {"cos": np.ones((1, N, 1, WIDTH // 2), np.float32), "sin": np.zeros((1, N, 1, WIDTH // 2), np.float32)}
HEADED = (1, N, HEADS, WIDTH)
LORA = ((OUT, D), None, (RANK, D), (OUT, RANK))
CALLS = {
    "embedding": Both("embedding", (VOCABULARY, D), parameters=(0,), tokens=labels[None]),
    "rms_norm": Both("rms_norm", (1, N, D), (D,), parameters=(1,), eps=1e-5, needs=(True, False)),
    "layer_norm": Both("layer_norm", (1, N, D), (D,), (D,), parameters=(1, 2), eps=1e-5, needs=(True, False, False)),
    "linear, frozen": Both("linear", (1, N, D), (OUT, D), parameters=(1,), needs=(True, False)),
    "linear, trained": Both("linear", (1, N, D), (OUT, D), parameters=(1,), needs=(True, True)),
    "lora_linear": Both(
        "lora_linear", (1, N, D), *LORA, parameters=(1, 3, 4), scale=2.0, needs=(True, False, False, True, True)
    ),
    "lora_linear, A frozen": Both(
        "lora_linear", (1, N, D), *LORA, parameters=(1, 3, 4), scale=2.0, needs=(True, False, False, False, True)
    ),
    "lora_linears": Both(
        "lora_linears",
        (1, N, D),
        *LORA,
        *LORA,
        parameters=(1, 3, 4, 5, 7, 8),
        scales=(2.0, 2.0),
        needs=(True, *(False, False, True, True) * 2),
    ),
    "lora_linears, not read": Both(
        "lora_linears",
        (1, N, D),
        *LORA,
        parameters=(1, 3, 4),
        scales=(2.0,),
        value=False,
        needs=(True, False, False, True, True),
    ),
    "low_rank": Both(
        "low_rank", (1, N, D), (RANK, D), (OUT, RANK), parameters=(1, 2), scale=2.0, needs=(True, True, True)
    ),
    "dropout": Both("dropout", (1, N, D), probability=0.1, seed=0),
    "add": Both("add", (1, N, D), (1, N, D), needs=(True, True)),
    "mul": Both("mul", (1, N, D), (1, N, D), needs=(True, True)),
    "sub": Both("sub", (1, N, D), (1, N, D), needs=(True, True)),
    "with_magnitude": Both(
        "with_magnitude",
        (1, N, OUT),
        (OUT,),
        None,
        parameters=(1,),
        norm=np.ones(OUT, np.float32),
        needs=(True, True, False),
    ),
    "with_magnitude, frozen": Both(
        "with_magnitude",
        (1, N, OUT),
        (OUT,),
        None,
        parameters=(1,),
        norm=np.ones(OUT, np.float32),
        needs=(True, False, False),
    ),
    "rotary": Both("rotary", HEADED, **angles),
    "attention": Both("attention", HEADED, (1, N, 2, WIDTH), (1, N, 2, WIDTH), scale=0.1),
    "silu_mul": Both("silu_mul", (1, N, OUT), (1, N, OUT)),
    "gelu_tanh": Both("gelu_tanh", (1, N, OUT)),
    "reshape": Both("reshape", (1, N, D), shape=(N, D)),
    "transpose": Both("transpose", (N, D), axes=(1, 0)),
    "getitem": Both("getitem", (1, N, D), index=(slice(None), slice(3, 9))),
    "unstack": Both("unstack", (1, N, 3, D), axis=2),
    "select_rows": Both("select_rows", (N, D), index=index),
    "add_rms_norm": Both(
        "add_rms_norm", (1, N, D), (1, N, D), (D,), parameters=(2,), eps=1e-5, needs=(True, True, False)
    ),
    "add_layer_norm": Both(
        "add_layer_norm",
        (1, N, D),
        (1, N, D),
        (D,),
        (D,),
        parameters=(2, 3),
        eps=1e-5,
        needs=(True, True, False, False),
    ),
    "linear_cross_entropy": Both(
        "linear_cross_entropy",
        (N, D),
        (VOCABULARY, D),
        parameters=(1,),
        labels=labels,
        weights=weights,
        needs=(True, False),
    ),
    "linear_cross_entropy, trained": Both(
        "linear_cross_entropy",
        (N, D),
        (VOCABULARY, D),
        parameters=(1,),
        labels=labels,
        weights=weights,
        needs=(True, True),
    ),
    "cross_entropy": Both("cross_entropy", (N, VOCABULARY), labels=labels, weights=weights),
}


def test_every_rule_is_compared():
    rules = {name for name in vars(Rules) if name in PRIMITIVES}
    assert rules == {call.name for call in CALLS.values()}


@pytest.mark.parametrize("name", CALLS)
def test_a_rule_makes_and_keeps_what_its_primitive_does(name):
    call = CALLS[name]
    (shapes, kept), (real_shapes, really_kept) = call.in_shapes(), call.in_arrays()
    assert shapes == real_shapes
    assert abs(kept - really_kept) <= SMALL, f"the rule keeps {kept:,} bytes, the primitive {really_kept:,}"


def test_a_closure_that_keeps_more_is_found():
    x = real(1, N, D)
    weight = real(OUT, D)
    for needs, least, most in (((True, False), 0, 0), ((True, True), x.nbytes, x.nbytes)):
        _, vjp = PRIMITIVES["linear"].implementation([x, weight], {})(x, weight, needs=needs)
        assert least <= kept_bytes(vjp, (id(weight), id(weight.base))) <= most


def chain(first: str, then: str) -> tuple[int, int]:
    """Bytes that lora_linear keeps of the result of another primitive: by the rules, and really."""
    ledger = Ledger()
    rules = Rules(ledger)
    needs = (True, False, False, True, True)
    factors = [real(RANK, D), real(OUT, RANK)]
    if first == "rms_norm":
        shaped, _ = rules.rms_norm(ShapeArray.taken(ledger, (1, N, D), np.float32), ShapeArray((D,), "f4"), eps=1e-5,
                                   needs=(True, False))  # fmt: skip
        x, _ = PRIMITIVES[first].implementation([real(1, N, D)] * 2, {"eps": 1e-5})(
            real(1, N, D), np.ones(D, np.float32), eps=1e-5, needs=(True, False)
        )
    else:
        shaped, _ = rules.silu_mul(*(ShapeArray.taken(ledger, (1, N, D), np.float32) for _ in range(2)))
        x, _ = ops.silu_mul.implementation([real(1, N, D)] * 2, {})(real(1, N, D), real(1, N, D))
    shapes = [ShapeArray(shape, np.float32) for shape in ((OUT, D), (RANK, D), (OUT, RANK))]
    _, vjp_in_shapes = rules.lora_linear(shaped, shapes[0], None, *shapes[1:], scale=2.0, needs=needs)
    del shaped, _
    weight = np.ones((OUT, D), np.float32)
    inputs = [x, weight, None, *factors]
    _, vjp = ops.lora_linear.implementation(inputs, {"scale": 2.0})(*inputs, scale=2.0, needs=needs)
    kept = ledger.alive
    assert vjp_in_shapes is not None
    held = (id(weight), *(id(owner) for factor in factors for owner in (factor, factor.base)))
    return kept, kept_bytes(vjp, held)


@pytest.mark.parametrize(("first", "arrays"), [("rms_norm", 1), ("silu_mul", 2)])
def test_an_input_that_can_be_made_again_is_not_kept_but_what_it_is_made_from(first, arrays):
    kept, really_kept = chain(first, "lora_linear")
    assert abs(kept - really_kept) <= SMALL
    assert abs(kept - arrays * N * D * 4) <= SMALL


@pytest.mark.parametrize("keeps_copies", [True, False])
def test_a_gpu_holds_a_trained_matrix_a_second_time_in_the_dtype_of_the_activations(keeps_copies):
    """From step to step, or in a recomputed block until its gradients are there (kernels/cuda/linear.py)."""
    ledger = Ledger()
    rules = Rules(ledger, on_gpu=True, keeps_copies=keeps_copies)
    x, weight = ShapeArray.taken(ledger, (N, D), np.float16), ShapeArray((OUT, D), np.float32)
    for _ in range(2):
        y, vjp = rules.linear(x, weight, needs=(True, True))
        assert ledger.alive == 2 * (N * D + N * OUT + OUT * D)
        dx, dweight, *_ = vjp(y)
        assert ledger.alive == 2 * (2 * N * D + N * OUT + keeps_copies * OUT * D) + 4 * OUT * D
        del y, vjp, dx, dweight
    rules.linear(x, weight, needs=(True, False))
    assert len(rules.copies) == keeps_copies  # a frozen one is converted for the product alone
