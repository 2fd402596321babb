"""The table about a finished run."""

import pytest

from train.memory.units import in_words
from train.run.report import RESIDENT, closing_table

SUMMARY = {
    "weight_bytes": 4_000_000,
    "adamw_state_bytes": 8_000_000,
    "planned_peak_bytes": 40_000_000,
    "peak_memory_bytes": 900_000_000,
    "peak_memory_source": RESIDENT,
    "tokens_per_second": 1234.5,
    "steps": 600,
    "skipped": 0,
    "refreshes": None,
}


def rows(state: dict[str, int], ends: int = 0, **changes) -> dict:
    found = closing_table({**SUMMARY, **changes}, state, ends)
    return {name.strip(): (value, note) for name, value, note in found}


def test_it_has_no_row_of_zeros_and_does_not_compare_adamw_with_itself():
    found = rows({"projections": 0, "moments": 7_999_996, "counters": 16})
    assert found["optimizer state"] == ("7.63 MiB", "")
    assert {"bases", "refreshes", "of these"}.isdisjoint(found)
    assert found["steps"] == ("600", "")
    assert found["planned peak"] == ("38.1 MiB", "of a step, on one device")
    assert found["measured peak"][0] == "858 MiB"
    assert "with Python, the compiler and data" in found["measured peak"][1]


def test_it_names_embedding_and_head_and_explains_what_is_counted():
    state = {"projections": 400_000, "moments": 3_600_000, "counters": 8}
    found = rows(state, ends=3_000_000, refreshes=70, skipped=2)
    assert found["optimizer state"][1] == "50% of AdamW's at full rank, 7.63 MiB"
    assert found["of these"] == ("2.86 MiB", "of embedding and head, most of it")
    assert found["refreshes"] == ("70", "bases found: one for each matrix and refresh")
    assert found["steps"][1] == "2 skipped: loss or gradient not finite, no weight changed"


@pytest.mark.parametrize(
    ("size", "said"),
    [(0, "0 bytes"), (133, "133 bytes"), (2048, "2.00 KiB"), (3.5e8, "334 MiB"), (1e12, "931 GiB")],
)
def test_bytes_are_said_in_the_unit_of_their_size(size, said):
    assert in_words(size) == said
