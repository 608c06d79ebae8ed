"""What training looks at on the way: the gradients of the first step, and where a NaN or infinity came from.

Both name tensors as the checkpoint does (`model.layers.3.mlp.down_proj.weight`), adapters by PEFT's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..backend import Array, array_module, cast, compute_dtype
from ..errors import MiniloraError
from ..nn import Module
from ..ops import CompressedWeight
from ..tensor import Tensor, observe

if TYPE_CHECKING:
    from ..model import Model

NAMES_SHOWN = 5
ENTRIES_AT_ONCE = 1 << 24  # of a tensor that is looked through: what is held besides it stays small


# --- the first step -------------------------------------------------------------------------------------------------


# The factor that is 0 in a new adapter, and the other one, whose gradient is therefore 0 in the first step: of a linear
# layer, and of an embedding.
START = {"lora_B": "lora_A", "lora_embedding_A": "lora_embedding_B"}


def factor_of(name: str) -> str:
    """Which factor a trained Tensor's name is of: "lora_A", "lora_embedding_B" …; "" for one that is none."""
    return next((part for part in name.split(".") if part in START or part in START.values()), "")


def pairs_that_start_at_zero(parameters: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The names (lora_A, lora_B) of each trained pair whose B is all zero, as a new adapter's is.

    For an embedding (lora_embedding_B, lora_embedding_A): there A is what starts at zero.
    """
    zeros = [name for name in parameters if factor_of(name) in START]
    pairs = [(name.replace(factor_of(name), START[factor_of(name)]), name) for name in zeros]
    return [(other, zero) for other, zero in pairs if other in parameters and not bool(parameters[zero].data.any())]


def check_first_gradients(parameters: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Check what B = 0 implies, on the gradients of the first step: the names of each lora_B that gets no gradient.

    dA = s · (g B)ᵀ x is exactly 0 where B is; any other value says that a gradient is derived wrongly: MiniloraError.
    dB = s · gᵀ (x Aᵀ) is 0 only where the layer does not reach the loss, or x or A is 0. Such a layer learns nothing
    now, which is no error of the others: the caller reports it. (For an embedding the same with A and B exchanged.)
    """
    for other, zero in pairs:
        grad = parameters[other].grad
        if grad is not None and bool(grad.any()):
            largest = float(abs(grad).max())
            raise MiniloraError(
                f"the first gradient of {other} is {largest:.3g} at its largest, expected exactly 0 since its "
                f"{factor_of(zero)} is 0: a gradient is derived wrongly (minilora.gradcheck finds the primitive); "
                "nothing was updated"
            )
    return [zero for _, zero in pairs if (grad := parameters[zero].grad) is None or not bool(grad.any())]


def some_names(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


# --- the first non-finite tensor ------------------------------------------------------------------------------------


def non_finite_tensor(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first that has a NaN or infinity, and how many, or None."""
    return next((f"{name} ({fault})" for name, tensor in tensors.items() if (fault := _fault(tensor.data))), None)


def first_non_finite(model: Model, replay: Callable[[], object]) -> str:
    """Where the first NaN or infinity is, in words: a parameter, else the first activation, else the first gradient.

    `replay` computes the gradients of the step once more, so that every primitive's result is seen.
    """
    if found := non_finite_tensor(dict(model.network.named_parameters())):
        return f"{found} of the base: its file is damaged or its dtype too narrow, or lower lr if it is trained"
    for adapter in model.active_adapters:
        if found := non_finite_tensor(model.adapter_parameters(adapter)):
            return f"{found} of adapter {adapter!r}: lower lr, or start from an adapter that is whole"
    if activation := _first_activation(model, replay):
        return f"{activation}: lower lr, or compute in float32 or float64"
    gradients = {name: Tensor(tensor.grad) for name, tensor in model.parameters().items() if tensor.grad is not None}
    broken = [name for name, gradient in gradients.items() if _fault(gradient.data)]
    if broken:
        name = max(broken, key=lambda name: _depth(name, model))  # backward reaches the last layers first
        return f"the gradient of {name} ({_fault(gradients[name].data)}), all activations being finite: lower lr"
    return "none when looked for again: a sum over the batch overflows; lower lr, or compute in float64"


def _first_activation(model: Model, replay: Callable[[], object]) -> str | None:
    found: list[str] = []
    with _tracked_modules(model.network) as path:

        def look(primitive: str, outputs: tuple[Array, ...], recorded: bool) -> None:
            for output in outputs:
                if not found and (fault := _fault(output)):
                    where = f"in {path[-1]}" if path and path[-1] else "between the modules"
                    found.append(f"the result of {primitive} {where}, shape {output.shape} ({fault})")

        with observe(look):
            replay()
    return found[0] if found else None


@contextmanager
def _tracked_modules(network: Module) -> Iterator[list[str]]:
    """Inside, the list holds the names of the modules that are being called, the innermost last."""
    names = {id(module): name for name, module in network.named_modules()}
    path: list[str] = []
    plain_call = Module.__call__

    def tracked_call(module: Module, *args: Any) -> Any:
        path.append(names.get(id(module), type(module).__name__))
        try:
            return plain_call(module, *args)
        finally:
            path.pop()

    Module.__call__ = tracked_call  # type: ignore[method-assign, assignment]
    try:
        yield path
    finally:
        Module.__call__ = plain_call  # type: ignore[method-assign]


def _fault(data: Any) -> str | None:
    """ "2 of 4,096 entries are nan", or None where all are finite (integers always are)."""
    array = data.dense() if isinstance(data, CompressedWeight) else data
    if array.dtype.kind in "iub":
        return None
    xp, flat = array_module(array), array.reshape(-1)
    bad, kind = 0, ""
    for start in range(0, flat.size, ENTRIES_AT_ONCE):
        part = flat[start : start + ENTRIES_AT_ONCE]
        part = cast(part, compute_dtype(part.dtype))
        finite = xp.isfinite(part)
        if not bool(finite.all()):
            bad += int((~finite).sum())
            kind = kind or str(float(part[~finite][0]))
    return f"{bad:,} of {flat.size:,} entries, the first is {kind}" if bad else None


def _depth(name: str, model: Model) -> int:
    """Where in the network's order of modules a parameter or adapter tensor lies."""
    modules = [path for path, _ in model.network.named_modules() if path]
    inside = [number for number, path in enumerate(modules) if f".{path}." in f".{name}"]
    return max(inside, default=-1)
