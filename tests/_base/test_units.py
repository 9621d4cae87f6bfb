import pytest

from fastalign import UserError
from fastalign._base.units import parse_bytes


@pytest.mark.parametrize(
    "value, size",
    [
        (7, 7),
        ("7", 7),
        ("4GB", 4 * 10**9),
        ("512MiB", 512 << 20),
        (" 1.5 gb ", 1_500_000_000),
        ("2k", 2000),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(value, size):
    assert parse_bytes("memory_limit", value) == size


@pytest.mark.parametrize("value", [0, -1, "", "four", "4XB", "-4GB", "0GB", None, True, 1.5])
def test_no_sizes(value):
    with pytest.raises(UserError, match="memory_limit must be a size"):
        parse_bytes("memory_limit", value)
