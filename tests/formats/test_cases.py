"""The cases of the format contract: a part of the grid still shows everything."""

import pytest

from autorank.testing import cases


@pytest.mark.parametrize("every", [1, 4, 1000])
def test_a_part_of_the_grid_shows_every_value_of_every_field(every):
    grid = cases.grid()
    part = cases.thinned(grid, every)
    for name in ("kernel", "stride", "padding", "padding_mode", "dilation", "groups", "output_padding"):
        whole, left = ({(c.spec.kind, getattr(c.spec, name)) for c in found} for found in (grid, part))
        assert left == whole
    assert part == [case for case in grid if case in part]
    assert len(part) <= len(grid) / every + 80
    assert cases.thinned(grid, every) == part
    assert every > 1 or part == grid
