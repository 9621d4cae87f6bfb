"""A wrong argument, refused in one line."""

import pytest

from fastalign import UserError


def assert_one_line(call, message):
    with pytest.raises(UserError) as caught:
        call()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
