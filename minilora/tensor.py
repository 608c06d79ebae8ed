"""The autograd: `Tensor`, the tape of what was computed, and `backward()`, which walks it.

A *primitive* is a function on arrays that returns its value and its vjp (vector-Jacobian product), a few lines apart:

    @primitive
    def mul(a, b):
        def vjp(dy):                    # dy = ∂L/∂y, of y's shape
            return dy * b, dy * a       # ∂L/∂a, ∂L/∂b
        return a * b, vjp

Called with Tensors, it records one node on the tape: the vjp, and where its results go. Nothing is recorded when no
input needs a gradient, so a frozen network costs no memory; and a vjp's closure holds exactly the arrays that backward
needs. Backward visits nodes in the reverse of the order they were made in, and frees each as soon as it was used.

References: Baydin et al. 2018, "Automatic differentiation in machine learning: a survey"; micrograd and HIPS autograd
for the form; Chen et al. 2016, "Training deep nets with sublinear memory cost", for `checkpoint`.
"""

from __future__ import annotations

import heapq
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from .backend import FLOAT_DTYPES, Array, array_module, device_of, to_numpy

_creation = itertools.count()  # a node's number: creation order is a topological order
_recording = True  # False inside no_grad()
_kernels_enabled = True  # False inside definitions_only()
_observers: list[Callable[[str, tuple[Array, ...], bool], None]] = []


class Node:
    """One recorded primitive call: its vjp, and for each input the place that its gradient goes to."""

    __slots__ = ("destinations", "name", "order", "outputs", "pending", "vjp")

    def __init__(self, name: str, vjp: Callable, destinations: tuple, outputs: tuple[Array, ...]) -> None:
        self.name = name
        self.order = next(_creation)
        self.vjp: Callable | None = vjp
        self.destinations: tuple[tuple[Node, int] | Tensor | None, ...] = destinations
        self.outputs = [(array.shape, array.dtype, array_module(array)) for array in outputs]  # to make a zero gradient
        self.pending: list[Array | None] = [None] * len(outputs)  # gradients of the outputs, summed as they arrive


class Tensor:
    """An array that gradients can flow to.

    data: the NumPy or CuPy array. grad: ∂L/∂data with the same shape and dtype after `backward()`, on leaves (Tensors
    made by hand) with requires_grad=True; further backward passes add to it. Results of primitives carry a node
    instead.
    """

    __slots__ = ("data", "grad", "source", "trained")
    __array_ufunc__ = None  # array + tensor is the Tensor's business, not an array of one Tensor per entry

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        is_array = hasattr(data, "dtype") and hasattr(data, "shape") and not isinstance(data, np.generic)
        self.data: Array = data if is_array else np.asarray(data)  # of NumPy's scalars too: they cannot be updated
        self.grad: Array | None = None
        self.trained = requires_grad
        self.source: tuple[Node, int] | None = None  # the node that made it, and which of its outputs it is
        if requires_grad and self.data.dtype.name not in FLOAT_DTYPES:
            raise TypeError(
                f"a Tensor of dtype {self.data.dtype} cannot require a gradient: convert it to a float dtype"
            )

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient flows to this Tensor: it is a trained leaf, or was computed from one."""
        return self.trained or self.source is not None

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if self.source is not None:
            raise ValueError(
                "requires_grad is set on leaves only: this Tensor is the result of a primitive; use detach()"
            )
        self.trained = value

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    @property
    def ndim(self) -> int:
        return len(self.data.shape)

    @property
    def size(self) -> int:
        return int(self.data.size)

    @property
    def device(self) -> str:
        """ "cpu" or "cuda:N"."""
        return device_of(self.data)

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array."""
        return to_numpy(self.data)

    def item(self) -> float:
        """The value of a Tensor with one element."""
        return float(to_numpy(self.data).reshape(()))

    def __float__(self) -> float:
        return self.item()

    def __len__(self) -> int:
        return self.data.shape[0]

    def detach(self) -> Tensor:
        """A leaf over the same array, outside the tape."""
        return Tensor(self.data)

    def __repr__(self) -> str:
        return f"Tensor({self.data!r}, requires_grad={self.requires_grad})"

    def backward(self, grad: Array | None = None) -> None:
        """Add ∂self/∂leaf · grad to `.grad` of every trained leaf; `grad` is 1 for a scalar when left out.

        The tape is freed on the way: a second call needs a new forward pass. ValueError where nothing is trained.
        """
        if not self.requires_grad:
            raise ValueError(
                "backward() from a Tensor that was computed from nothing that is trained, or inside no_grad(): set "
                "requires_grad on a leaf, or select an adapter, and compute it again"
            )
        if grad is None:
            if self.size != 1:
                raise ValueError(
                    f"backward() without a gradient needs a scalar, found shape {self.shape}: sum it first"
                )
            grad = array_module(self.data).ones_like(self.data)
        backward([self], [grad])

    if TYPE_CHECKING:  # bound in ops/arithmetic.py, linalg.py and shape.py, beside what they call

        def __add__(self, other: Any) -> Tensor: ...
        def __radd__(self, other: Any) -> Tensor: ...
        def __sub__(self, other: Any) -> Tensor: ...
        def __rsub__(self, other: Any) -> Tensor: ...
        def __mul__(self, other: Any) -> Tensor: ...
        def __rmul__(self, other: Any) -> Tensor: ...
        def __truediv__(self, other: Any) -> Tensor: ...
        def __rtruediv__(self, other: Any) -> Tensor: ...
        def __neg__(self) -> Tensor: ...
        def __pow__(self, exponent: float) -> Tensor: ...
        def __matmul__(self, other: Any) -> Tensor: ...
        def __rmatmul__(self, other: Any) -> Tensor: ...
        def __getitem__(self, index: Any) -> Tensor: ...
        def sum(self, axis: Any = None, keepdims: bool = False) -> Tensor: ...
        def mean(self, axis: Any = None, keepdims: bool = False) -> Tensor: ...
        def reshape(self, *shape: Any) -> Tensor: ...
        def transpose(self, *axes: int) -> Tensor: ...
        @property
        def T(self) -> Tensor: ...


def backward(outputs: Sequence[Tensor], grads: Sequence[Array | None]) -> None:
    """Walk the tape from `outputs`, whose gradients are `grads`, and add to `.grad` of every trained leaf below.

    Iterative: a heap of nodes, latest first, so that a node is visited when all gradients of its outputs have arrived.
    """
    heap: list[tuple[int, Node]] = []
    waiting: set[int] = set()

    def send(destination: tuple[Node, int] | Tensor | None, grad: Array, borrowed: bool) -> None:
        if isinstance(destination, Tensor):
            _accumulate(destination, grad, borrowed)
        elif destination is not None:
            node, index = destination
            if node.vjp is None:
                raise RuntimeError(
                    f"backward() reached {node.name} a second time, and its graph is freed: run the forward pass again"
                )
            earlier = node.pending[index]
            node.pending[index] = grad if earlier is None else earlier + grad
            if node.order not in waiting:
                waiting.add(node.order)
                heapq.heappush(heap, (-node.order, node))

    for output, grad in zip(outputs, grads, strict=True):
        if grad is not None:
            if grad.shape != output.shape:
                raise ValueError(
                    f"backward() got a gradient of shape {grad.shape} for a Tensor of shape {output.shape}"
                )
            send(output.source or (output if output.trained else None), grad, borrowed=True)
    while heap:
        _, node = heapq.heappop(heap)
        assert node.vjp is not None
        arriving = tuple(
            xp.zeros(shape, dtype) if grad is None else grad.astype(dtype, copy=False)
            for grad, (shape, dtype, xp) in zip(node.pending, node.outputs, strict=True)
        )
        results = node.vjp(*arriving)
        destinations = node.destinations
        node.vjp, node.destinations, node.pending = None, (), []  # what backward needed is free from here on
        results = results if isinstance(results, tuple) else (results,)
        for position, (destination, result) in enumerate(zip(destinations, results, strict=True)):
            if result is not None and destination is not None:
                borrowed = result.base is not None or any(result is a for a in (*arriving, *results[:position]))
                send(destination, result, borrowed)
        del results, arriving


def _accumulate(leaf: Tensor, grad: Array, borrowed: bool) -> None:
    """leaf.grad += grad, never writing into an array that something else may still hold."""
    if grad.shape != leaf.data.shape:
        raise ValueError(f"a vjp returned a gradient of shape {grad.shape} for a Tensor of shape {leaf.data.shape}")
    if leaf.grad is not None:
        leaf.grad = leaf.grad + grad.astype(leaf.data.dtype, copy=False)
    else:
        leaf.grad = grad.astype(leaf.data.dtype, copy=borrowed)


# --- primitives -----------------------------------------------------------------------------------------------------


class Kernel:
    """A faster function for the same maths as a primitive's definition, on one kind of device."""

    def __init__(self, function: Callable, device: str, applies: Callable[..., bool]) -> None:
        self.function, self.device, self.applies = function, device, applies
        self.name = f"{function.__module__.rpartition('minilora.')[2]}.{function.__name__}"


class Primitive:
    """A differentiable function: its definition in ops/, and the kernels that may stand in for it.

    The definition takes arrays and returns (value, vjp); value may be a tuple of arrays. It is called with as many
    positional arguments as it has inputs (Tensors, arrays, numbers or None); options are keywords. vjp takes the
    gradient of each output and returns one gradient, or None, per positional argument. A definition with a keyword
    `needs` is told which of its positional arguments need a gradient, so that its closure holds, and its vjp computes,
    nothing else.
    """

    def __init__(self, definition: Callable) -> None:
        self.definition = definition
        self.name: str = definition.__name__
        self.kernels: list[Kernel] = []
        self.wants_needs = "needs" in inspect.signature(definition).parameters
        self.__name__, self.__doc__, self.__module__ = self.name, definition.__doc__, definition.__module__
        self.__wrapped__ = definition

    def kernel(
        self, device: str, applies: Callable[..., bool] = lambda *args, **kwargs: True
    ) -> Callable[[Callable], Callable]:
        """Register a faster function for `device` ("cpu" or "cuda") where `applies(*arrays, **options)` holds."""

        def register(function: Callable) -> Callable:
            self.kernels.append(Kernel(function, device, applies))
            return function

        return register

    def implementation(self, arrays: Sequence[Any], options: dict[str, Any]) -> Callable:
        """The function that a call with these arrays runs: the last kernel that applies, or the definition."""
        if self.kernels and _kernels_enabled:
            device = "cpu" if array_module(*arrays) is np else "cuda"
            for kernel in reversed(self.kernels):
                if kernel.device == device and kernel.applies(*arrays, **options):
                    return kernel.function
        return self.definition

    def has_kernel_for(self, *inputs: Any, **options: Any) -> bool:
        """Whether a call with these inputs would run a kernel, for callers that have another way without one."""
        arrays = [value.data if isinstance(value, Tensor) else value for value in inputs]
        return self.implementation(arrays, options) is not self.definition

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        arrays = [value.data if isinstance(value, Tensor) else value for value in inputs]
        needs = tuple(_recording and isinstance(value, Tensor) and value.requires_grad for value in inputs)
        function = self.implementation(arrays, options)
        values, vjp = function(*arrays, **options, needs=needs) if self.wants_needs else function(*arrays, **options)
        outputs = values if isinstance(values, tuple) else (values,)
        record = any(needs)
        for observer in _observers:
            observer(self.name, outputs, record)
        results = (
            _record(self.name, outputs, vjp, inputs, needs) if record else tuple(Tensor(array) for array in outputs)
        )
        return results if isinstance(values, tuple) else results[0]


PRIMITIVES: dict[str, Primitive] = {}


def primitive(definition: Callable) -> Primitive:
    """Make a differentiable function of Tensors from one of arrays that returns (value, vjp). See `Primitive`."""
    PRIMITIVES[definition.__name__] = result = Primitive(definition)
    return result


def _record(
    name: str, outputs: tuple[Array, ...], vjp: Callable, inputs: Iterable[Any], needs: Iterable[bool]
) -> tuple[Tensor, ...]:
    destinations = tuple((value.source or value) if need else None for value, need in zip(inputs, needs, strict=True))
    node = Node(name, vjp, destinations, outputs)
    results = tuple(Tensor(array) for array in outputs)
    for index, result in enumerate(results):
        result.source = (node, index)
    return results


def is_recording() -> bool:
    """Whether primitives record now: not inside no_grad()."""
    return _recording


def kernels_enabled() -> bool:
    """Whether kernels may stand in for definitions now: not inside definitions_only()."""
    return _kernels_enabled


@contextmanager
def no_grad() -> Iterator[None]:
    """Inside, nothing is recorded: results need no gradient."""
    with _set(_recording=False):
        yield


@contextmanager
def definitions_only() -> Iterator[None]:
    """Inside, primitives run their definitions and no kernel."""
    with _set(_kernels_enabled=False):
        yield


@contextmanager
def _set(**flags: bool) -> Iterator[None]:
    """Inside, this module's flags of these names have these values."""
    before = {name: globals()[name] for name in flags}
    globals().update(flags)
    try:
        yield
    finally:
        globals().update(before)


@contextmanager
def observe(observer: Callable[[str, tuple[Array, ...], bool], None]) -> Iterator[None]:
    """Inside, `observer(name, outputs, recorded)` sees every primitive call: for tests and for finding a first NaN."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def checkpoint(
    function: Callable[..., Tensor],
    *inputs: Tensor,
    parameters: Iterable[Tensor] = (),
    again: Callable[..., Tensor] | None = None,
) -> Tensor:
    """function(*inputs), keeping only the inputs: backward runs the function again to have its activations.

    `parameters` are the trained Tensors that the function uses besides its inputs; their gradients are added on the
    way. The function must give the same result when it is run again (Chen et al. 2016). again: what backward runs in
    its place, where there is something with the same gradients and without the result, which nobody reads then.
    """
    needs = tuple(value.requires_grad for value in inputs)
    if not _recording or not (any(needs) or any(parameter.requires_grad for parameter in parameters)):
        return function(*inputs)
    with no_grad():
        value = function(*inputs)
    arrays = [tensor.data for tensor in inputs]  # not the Tensors: those would keep their own history alive

    def vjp(dy: Array) -> tuple[Array | None, ...]:
        leaves = [Tensor(array, requires_grad=need) for array, need in zip(arrays, needs, strict=True)]
        with _set(_recording=True):
            result = (again or function)(*leaves)
        backward([result], [dy])
        return tuple(leaf.grad for leaf in leaves)

    (result,) = _record("checkpoint", (value.data,), vjp, inputs, needs)
    return result
