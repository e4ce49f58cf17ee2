"""Numbers in sentences."""

import pytest

from llmperf import machine


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.01234, "0.0123"),
        (45.64, "45.6"),
        (999.4, "999"),
        (999.6, "1,000"),
        (2223.6, "2,224"),
        (-1234.5, "-1,234"),
    ],
)
def test_a_large_number_has_no_exponent(value, text):
    assert machine.significant(value) == text


def test_two_digits():
    assert [machine.significant(x, 2) for x in (98.7, 165.3, 1979.0)] == ["99", "165", "1,979"]
