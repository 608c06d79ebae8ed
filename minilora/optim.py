"""Adam and AdamW over the trained Tensors only, gradient clipping by global norm, learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from .backend import Array, array_module, to_device
from .errors import MiniloraError
from .execution import all_at_once
from .tensor import Tensor


def named(parameters: Mapping[str, Tensor] | Iterable[Tensor]) -> dict[str, Tensor]:
    """The parameters by name: a dict's own keys, or "0", "1", … for an iterable."""
    if isinstance(parameters, Mapping):
        return dict(parameters)
    return {str(index): parameter for index, parameter in enumerate(parameters)}


class AdamW:
    """Adam with decoupled weight decay (Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2), as
    torch.optim.AdamW.

    With g the gradient and t the parameter's own step count:
        w ← w (1 − lr λ);  m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²
        w ← w − lr · m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + ε)
    parameters: a dict or an iterable of Tensors. A Tensor without a gradient is left alone, its step count too. m and v
    are made at a Tensor's first step, with its dtype and on its device.
    lr_scale: {name: factor} of parameters whose learning rate is that many times lr, as torch's parameter groups.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor] | Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        lr_scale: Mapping[str, float] | None = None,
    ) -> None:
        self.parameters = {name: parameter for name, parameter in named(parameters).items() if parameter.requires_grad}
        if not self.parameters:
            raise MiniloraError(
                "the optimiser was given no trained parameter: add an adapter, or unfreeze something first"
            )
        in_range = 0 <= lr < math.inf and 0 < eps < math.inf and 0 <= weight_decay < math.inf
        if not in_range or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise MiniloraError(
                f"optimiser settings lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay} are outside "
                "lr ≥ 0, two betas with 0 ≤ beta < 1, eps > 0, weight_decay ≥ 0"
            )
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.lr_scale = dict(lr_scale or {})
        for name, factor in self.lr_scale.items():
            if name not in self.parameters or not 0 <= factor < math.inf:
                raise MiniloraError(
                    f"lr_scale has {name!r}: {factor}, expected a trained parameter's name and a factor of at least 0"
                )
        self.l2 = 0.0  # of `Adam`
        self.steps: dict[str, int] = dict.fromkeys(self.parameters, 0)
        self.moments: dict[str, tuple[Array, Array]] = {}

    def step(self) -> None:
        """Update every parameter that has a gradient, in place."""
        due: list[tuple[Array, Array, Array, Array, int, float]] = []
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            if name not in self.moments:
                xp = array_module(parameter.data)
                self.moments[name] = (xp.zeros_like(parameter.data), xp.zeros_like(parameter.data))
            m, v = (to_device(moment, parameter.device) for moment in self.moments[name])  # a copy after model.to only
            self.moments[name] = (m, v)
            self.steps[name] += 1
            lr = self.lr * self.lr_scale.get(name, 1.0)
            due.append((parameter.data, parameter.grad, m, v, self.steps[name], lr))
        ws, gs, ms, vs = ([arrays[position] for arrays in due] for position in range(4))
        if together := all_at_once(gs, *ws, *ms, *vs):
            beta1, beta2 = self.betas
            rates = [(lr, lr / (1 - beta1**t), 1 / math.sqrt(1 - beta2**t)) for *_, t, lr in due]
            together.adamw(ws, gs, ms, vs, np.array(rates), self.betas, self.eps, self.weight_decay, self.l2)
            return
        for w, g, m, v, t, lr in due:
            self._update(w, g, m, v, t, lr)

    def _update(self, w: Array, g: Array, m: Array, v: Array, t: int, lr: float) -> None:
        beta1, beta2 = self.betas
        if self.weight_decay:
            w *= 1 - lr * self.weight_decay
        m *= beta1
        m += (1 - beta1) * g
        v *= beta2
        v += (1 - beta2) * (g * g)
        denominator = array_module(w).sqrt(v)
        denominator *= 1 / math.sqrt(1 - beta2**t)
        denominator += self.eps
        w -= (lr / (1 - beta1**t)) * (m / denominator)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_bytes(self) -> int:
        """Bytes that the moments take."""
        return sum(m.nbytes + v.nbytes for m, v in self.moments.values())

    def state(self) -> dict[str, Any]:
        """What an exact resume needs: step counts and moments by parameter name (arrays are not copied)."""
        return {"steps": dict(self.steps), "moments": dict(self.moments)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`; MiniloraError if it is of other parameters."""
        if set(state["steps"]) != set(self.parameters):
            raise MiniloraError(
                "the optimiser state is of other parameters than this adapter's: resume with the same configuration"
            )
        self.steps = dict(state["steps"])
        self.moments = {}
        for name, (m, v) in state["moments"].items():
            w = self.parameters[name].data
            if m.shape != w.shape or v.shape != w.shape:
                raise MiniloraError(f"the optimiser state of {name} has shape {m.shape}, expected {w.shape}")
            xp = array_module(w)
            self.moments[name] = (xp.array(m, dtype=w.dtype), xp.array(v, dtype=w.dtype))


class Adam(AdamW):
    """Adam with weight decay as an L2 term in the gradient, g + λ w (Kingma & Ba 2015), as torch.optim.Adam."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor] | Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        lr_scale: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(parameters, lr, betas, eps, weight_decay, lr_scale)
        self.l2, self.weight_decay = weight_decay, 0.0

    def _update(self, w: Array, g: Array, m: Array, v: Array, t: int, lr: float) -> None:
        super()._update(w, g + self.l2 * w if self.l2 else g, m, v, t, lr)


def global_norm(parameters: Mapping[str, Tensor] | Iterable[Tensor]) -> Array:
    """√(Σ g²) over all gradients, as a 0-d float64 array on their device (reading it on a GPU waits for it)."""
    grads = [parameter.grad for parameter in named(parameters).values() if parameter.grad is not None]
    if together := all_at_once(grads):
        return together.norm(grads)
    total: Any = np.zeros(())
    for grad in grads:
        xp = array_module(grad)
        total = xp.square(grad).sum(dtype=np.float64) + xp.asarray(total)
    return array_module(total).sqrt(total)


def clip_grad_norm(parameters: Mapping[str, Tensor] | Iterable[Tensor], max_norm: float) -> Array:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)); the global norm before that (Pascanu et al. 2013)."""
    if not max_norm > 0:
        raise MiniloraError(f"max_norm is {max_norm}, expected a number above 0, e.g. 1.0")
    parameters = named(parameters)
    norm = global_norm(parameters)
    grads = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    if together := all_at_once(grads):
        together.clip(grads, norm, max_norm)
        return norm
    del grads  # or every old gradient would live until the last is clipped
    factor = array_module(norm).minimum(1.0, max_norm / (norm + 1e-6))
    for parameter in parameters.values():
        if parameter.grad is not None:
            parameter.grad = parameter.grad * factor.astype(parameter.grad.dtype)
    return norm


SCHEDULES = ("constant", "linear", "cosine")


def schedule(kind: str, steps: int, warmup: int = 0, floor: float = 0.0) -> Callable[[int], float]:
    """The factor on the learning rate at step 0, 1, … `steps` − 1: a linear rise over `warmup` steps, then `kind`.

    "constant" stays at 1; "linear" and "cosine" fall to `floor` at the end (cosine: Loshchilov & Hutter 2017, eq. 5,
    without restarts). The first step of a warm-up has 1 / (warmup + 1), not zero.
    """
    if kind not in SCHEDULES:
        raise MiniloraError(f"schedule is {kind!r}, expected one of {', '.join(SCHEDULES)}")
    if warmup < 0 or steps < 0 or not 0 <= floor <= 1:
        raise MiniloraError(
            f"a schedule needs steps ≥ 0, warmup ≥ 0 and floor in [0, 1], found {steps}, {warmup}, {floor}"
        )

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if kind == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        shape = 1 - progress if kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return floor + (1 - floor) * shape

    return factor
