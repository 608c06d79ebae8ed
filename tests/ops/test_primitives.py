"""Every primitive: its vjp is autograd of its composition is finite differences; every kernel is its definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.tensor import PRIMITIVES
from tests.cases import CASES, check_primitive


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
def test_the_vjp_is_autograd_of_the_composition_is_finite_differences(name, data, device):
    check_primitive(name, CASES[name], data.draw(CASES[name].calls), device)


def test_every_primitive_has_a_case():
    assert set(CASES) == set(PRIMITIVES)
