"""Adam, AdamW and clipping against torch's, step by step."""

from __future__ import annotations

import numpy as np
import pytest

import minilora as ml
from tests import tiny
from tests.parity.reference import torch

pytestmark = pytest.mark.parity

SHAPES = {"a": (3, 5), "b": (4,), "c": (2, 3, 2)}
SETTINGS = {
    "AdamW": {"weight_decay": 0.1},
    "AdamW without decay": {"weight_decay": 0.0},
    "Adam": {},
    "Adam with decay": {"weight_decay": 0.1},
}


def gradients(step: int) -> dict[str, np.ndarray | None]:
    """Gradients over eight orders of magnitude; "b" has none in every third step."""
    random = np.random.default_rng(step)
    scale = 10.0 ** random.integers(-6, 2)
    drawn = {name: random.normal(size=shape) * scale for name, shape in SHAPES.items()}
    return drawn | ({"b": None} if step % 3 == 2 else {})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SETTINGS)
def test_fifty_steps_are_those_of_torch(name, dtype):
    random = np.random.default_rng(0)
    start = {key: random.normal(size=shape).astype(dtype) for key, shape in SHAPES.items()}
    ours = {key: ml.Tensor(array.copy(), requires_grad=True) for key, array in start.items()}
    theirs = {key: torch.nn.Parameter(torch.from_numpy(array.copy())) for key, array in start.items()}
    settings = {"lr": 0.01, "betas": (0.85, 0.97), "eps": 1e-5} | SETTINGS[name]
    algorithm = name.split()[0]
    optimiser = getattr(ml, algorithm)(ours, **settings)
    reference = getattr(torch.optim, algorithm)(list(theirs.values()), **settings)
    for step in range(50):
        optimiser.lr = 0.01 / (step + 1)
        reference.param_groups[0]["lr"] = 0.01 / (step + 1)
        for key, gradient in gradients(step).items():
            ours[key].grad = None if gradient is None else gradient.astype(dtype)
            theirs[key].grad = None if gradient is None else torch.from_numpy(gradient.astype(dtype))
        optimiser.step()
        reference.step()
        for key in SHAPES:
            error = tiny.relative_error(ours[key].data, theirs[key].detach())
            assert error < (1e-6 if dtype == "float32" else 1e-14), (step, key)


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e4])
def test_clipping_is_that_of_torch(max_norm):
    drawn = {name: value for name, value in gradients(0).items() if value is not None}
    ours = {name: ml.Tensor(np.zeros(shape), requires_grad=True) for name, shape in SHAPES.items()}
    theirs = {name: torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for name, shape in SHAPES.items()}
    for name, gradient in drawn.items():
        ours[name].grad, theirs[name].grad = gradient * 50, torch.from_numpy(gradient * 50)
    norm = ml.clip_grad_norm(ours, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm)
    assert float(norm) == pytest.approx(expected.item(), rel=1e-14)
    for name in drawn:
        assert tiny.relative_error(ours[name].grad, theirs[name].grad) < 1e-14
