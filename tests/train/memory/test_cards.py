"""Cards to compile for: their names and files, and their peaks."""

import pytest

from train.memory import cards
from train.memory.cards import CARDS, card_of_size, devices, find_card, peak_flops


@pytest.mark.parametrize("name", CARDS)
def test_a_card_is_found_by_its_name_with_and_without_size(name):
    card = find_card(name)
    assert find_card(name.rpartition("-")[0]) == card
    assert card.kind.startswith("NVIDIA ")
    assert f"memory_bandwidth: {card.bandwidth}\n" in card.target
    assert card.peak_flops("bfloat16") == pytest.approx(2 * card.peak_flops("float32"), rel=0.01)


def test_a_target_file_is_read_like_the_table(tmp_path):
    card = find_card("rtx-4090")
    file = tmp_path / "mine.txtpb"
    file.write_text(card.target)
    assert find_card(str(file)) == card


def test_an_unknown_kind_has_no_peak(tmp_path):
    file = tmp_path / "mine.txtpb"
    file.write_text(find_card("rtx-4090").target.replace("RTX 4090", "RTX 9999"))
    assert find_card(str(file)).peak_flops("bfloat16") is None


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA GeForce RTX 3080", 59.5e12),
        ("NVIDIA GeForce RTX 3080 Ti", None),
        ("NVIDIA GeForce RTX 4060 Ti", 44.1e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", None),
        ("cpu", None),
    ],
)
def test_a_peak_is_of_the_kind_itself(kind, peak):
    assert peak_flops(kind, "bfloat16") == peak


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected one of rtx-3060-12gb, .* or a target file"),
        ("", "has no name: expected XLA's GpuTargetConfigProto"),
        ("major: 8", "compute capability 7: expected 8.0 or higher"),
    ],
    ids=["absent", "empty", "old"],
)
def test_what_is_no_target_is_refused(text, message, tmp_path):
    file = tmp_path / "mine.txtpb"
    if text is not None:
        file.write_text(find_card("rtx-4090").target.replace(text, "major: 7") if text else "")
    with pytest.raises(ValueError, match=message):
        find_card(str(file))


def test_a_size_finds_the_smallest_card_that_is_as_large():
    assert card_of_size(12) == find_card("rtx-3060")
    assert card_of_size(12.5) == find_card("rtx-4060-ti")
    assert card_of_size(40) == card_of_size(80) == find_card("a100")
    with pytest.raises(ValueError, match="--card 142: no card is as large: expected at most 141"):
        card_of_size(142)


def test_without_the_wheels_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(cards, "is_installed", lambda module: False)
    assert not cards.can_compile()
    with pytest.raises(ValueError, match=r"RTX 3060 needs .* install the extra gpu-target"):
        devices(find_card("rtx-3060"), 1)
