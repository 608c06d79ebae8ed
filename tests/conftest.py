"""What every test shares: the device its arrays live on, and how many examples hypothesis tries.

pytest                      arrays on the CPU, few examples, the same ones every time
pytest --device cuda        the same tests with CuPy arrays
pytest --thorough           20 times as many examples
"""

from __future__ import annotations

import signal

import pytest
from hypothesis import HealthCheck, Phase, settings

from minilora.backend import parse_device
from minilora.errors import MiniloraError

EXAMPLES = 25
THOROUGH = 20  # times as many

_common = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    # `device` is a string that no example changes.
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("ci", max_examples=EXAMPLES, **_common)
settings.register_profile("thorough", max_examples=EXAMPLES * THOROUGH, **_common)
# For tests that are to fail on a planted bug: the first failing example is enough (tests/mutants).
settings.register_profile("failing", max_examples=EXAMPLES, phases=[Phase.explicit, Phase.generate], **_common)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tests' arrays live: cpu, cuda or cuda:N (default: cpu)")
    parser.addoption("--thorough", action="store_true", help=f"try {THOROUGH} times as many examples")


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts background jobs with Ctrl-C ignored, and that is inherited: tests of Ctrl-C need it heard.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        parse_device(config.getoption("--device"))
    except MiniloraError as error:
        raise pytest.UsageError(str(error)) from None
    if config.getoption("--thorough"):
        settings.load_profile("thorough")


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """The device that --device names, for `backend.to_device`."""
    return str(pytestconfig.getoption("--device"))
