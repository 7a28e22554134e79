"""Numbers as they are printed."""

import math

import pytest

from latticeflow.cli.report import aligned, value_error


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.756291, 0.00049, "0.75629(49)"),
        (-0.756291, 0.00049, "-0.75629(49)"),
        (1.0, 0.1, "1.00(10)"),
        (1.0, 0.0995, "1.00(10)"),
        (0.123456, 0.00996, "0.123(10)"),
        (5.0, 1.0, "5.0(1.0)"),
        (5.0, 0.996, "5.0(1.0)"),
        (5.0, 9.94, "5.0(9.9)"),
        (5.0, 9.96, "5(10)"),
        (12345.0, 15.0, "12345(15)"),
        (123456.0, 2345.0, "123500(2300)"),
        (123456.0, 99.6, "123460(100)"),
        (1e-12, 1e-5, "0.000000(10)"),
        (0.5, 1e-10, "0.50000000000(10)"),
        (1.2e-15, 3e-16, "1.2e-15 +- 3e-16"),
        (4.96e-13, 4e-14, "5e-13 +- 4e-14"),
        (1.9e-50, 1e-50, "1.9e-50 +- 1e-50"),
        (2.0, 0.0, "2"),
        (13.19020123, 0.0, "13.1902"),
        (0.0, 0.0, "0"),
        (1.0, math.nan, "1"),
        (math.nan, 0.1, "nan"),
    ],
)
def test_value_and_error(value, error, text):
    assert value_error(value, error) == text


@pytest.mark.parametrize("exponent", range(-9, 6))
def test_two_digits_of_the_error_at_every_size(exponent):
    """What is read back is the value and the error to within half a last digit."""
    value, error = 3.14159 * 10.0**exponent, 0.2718 * 10.0**exponent
    shown, digits = value_error(value, error).rstrip(")").split("(")
    unit = 1.0 if "." in digits else 10.0 ** -len(shown.partition(".")[2])
    assert float(digits) * unit == pytest.approx(error, rel=0.04)
    assert float(shown) == pytest.approx(value, abs=0.0051 * 10.0**exponent)


def test_an_infinite_error_is_shown():
    assert "inf" in value_error(1.0, math.inf)


def test_columns_are_aligned():
    assert aligned([("a", "bb", ""), ("aaa", "b", "c")]) == ["a    bb", "aaa  b   c"]
