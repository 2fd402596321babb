"""How rows are cut into parts."""

import pytest

from galore_optax.rows import parts


@pytest.mark.parametrize(("rows", "count"), [(512, 8), (32, 4), (5461, 1)])
def test_parts_are_as_many_as_needed_where_each_device_has_a_share_of_each(rows, count):
    assert parts(rows, 5, shares=8) == count
