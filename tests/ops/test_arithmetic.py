"""Corners of the general primitives that random inputs do not meet."""

import numpy as np

from minilora.backend import to_device, to_numpy
from minilora.tensor import Tensor


def test_a_power_of_zero_is_constant_also_where_the_base_is_zero(device):
    x = Tensor(to_device(np.array([-1.0, 0.0, 2.0]), device), requires_grad=True)
    y = x**0
    y.sum().backward()
    assert (to_numpy(y) == 1).all()
    assert (to_numpy(x.grad) == 0).all()
