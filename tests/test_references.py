"""Every row of the table in references.py; its tolerance is of the relative error."""

import pytest
import references


@pytest.mark.parametrize("row", references.table(), ids=lambda row: row.quantity)
def test_reference(row):
    assert references.error(row, row.ours()) <= row.tolerance
