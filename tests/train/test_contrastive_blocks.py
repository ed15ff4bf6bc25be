"""Tiles cover the matrix once and know their diagonal; dtypes are those of torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from declip_train.contrastive_blocks import (
    compute_dtype,
    default_tile_edge,
    full_precision,
    refuse_second_derivative,
    scaled_logits,
    tiles,
)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 10), st.integers(-9, 9))
def test_tiles_cover_every_entry_once_and_their_diagonals_the_whole_one(
    num_rows: int, num_columns: int, edge: int, offset: int
) -> None:
    seen = torch.zeros(num_rows, num_columns)
    for rows, band in tiles(num_rows, num_columns, edge):
        for tile in band:
            assert tile.rows == rows
            part = seen[tile.rows, tile.columns]
            assert max(part.shape) <= edge
            part += 1
            entries, own_rows, own_columns = tile.diagonal(part, offset)
            entries += 10
            for row, column in zip(
                range(*own_rows.indices(num_rows)),
                range(*own_columns.indices(num_columns)),
                strict=True,
            ):
                assert column == row + offset
                assert seen[row, column] >= 10
    expected = torch.ones(num_rows, num_columns)
    expected.diagonal(offset).add_(10)
    assert torch.equal(seen, expected)


def test_products_have_the_dtype_that_torch_would_give_them() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        features = torch.randn(3, 4).to(dtype)
        assert compute_dtype(features) == dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert compute_dtype(features) == (features @ features.T).dtype
        precise = full_precision(features).dtype
        assert precise == (torch.float64 if dtype == torch.float64 else torch.float32)
        logits = scaled_logits(features, features, torch.tensor(3.0, dtype=precise))
        assert logits.dtype == precise
        plain = (3 * features @ features.T).to(precise)
        torch.testing.assert_close(logits, plain, rtol=0.02, atol=0.02)


def test_every_device_has_a_tile_and_second_derivatives_are_refused() -> None:
    assert default_tile_edge(torch.device("cpu")) < default_tile_edge(torch.device("cuda"))
    with torch.no_grad():
        refuse_second_derivative()
    with pytest.raises(RuntimeError, match="differentiate it once, without create_graph"):
        refuse_second_derivative()
