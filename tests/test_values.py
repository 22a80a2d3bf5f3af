"""Sizes and durations as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gputrain.values import format_size, parse_limit, parse_seconds, parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("80GB", 80 * 10**9),
        ("80 gb", 80 * 10**9),
        ("79.5GiB", int(79.5 * 2**30)),
        (" 16 MiB ", 16 * 2**20),
        ("1TB", 10**12),
        ("512", 512),
        ("1B", 1),
        (1024, 1024),
        (80e9, 80 * 10**9),
    ],
)
def test_sizes(text: str | float, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "lots", "80XB", "-1GB", "0", "0GB", "1e3", "GB", 0, -5, True, None, 1.5]
)
def test_bad_sizes_say_what_is_legal(text: object) -> None:
    with pytest.raises(ValueError, match="is not a size above 0 such as") as raised:
        parse_size(text)  # type: ignore[arg-type]
    message = f'{text!r} is not a size above 0 such as "80GB", "79.1GiB" or a number of bytes'
    assert str(raised.value) == message


def test_a_limit_as_text_has_its_unit() -> None:
    assert [parse_limit(limit) for limit in (80, "80B", "65536")] == [80, 80, 65536]
    with pytest.raises(ValueError, match=r"^'80' is 80 bytes; give the unit, such as "):
        parse_limit("80")


@given(st.integers(min_value=1, max_value=2**50))
def test_a_formatted_size_reads_back_to_within_its_last_digit(num_bytes: int) -> None:
    read = parse_size(format_size(num_bytes).replace(" bytes", ""))
    assert abs(read - num_bytes) <= 0.05 * num_bytes + 1


@pytest.mark.parametrize(("text", "seconds"), [("1", 1.0), ("0.5", 0.5), ("1e3", 1000.0)])
def test_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "soon", ""])
def test_bad_seconds(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number of seconds above 0"):
        parse_seconds(text)
