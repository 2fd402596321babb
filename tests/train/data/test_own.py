"""Own text: what is for training, what for evaluation, and when there is too little."""

import pytest

from train.data.own import divided
from train.data.text import content_of


@pytest.mark.parametrize(
    ("found", "evaluation", "says"),
    [
        ([], None, "^name: there is no text in it"),
        (["a"], [], "^--eval-data: there is no text in it"),
        (["a", "a"], None, "name: one document, or several that are equal, cannot be"),
        (["a"], ["b", "a"], "name: --eval-data has all of it"),
    ],
)
def test_too_little_text_is_said_to_be_what_it_is(found, evaluation, says):
    with pytest.raises(ValueError, match=says):
        divided(found, evaluation, str, "name")


def test_equal_documents_are_on_one_side():
    found = divided([*"abcabc"], None, str, "name")
    assert found == {"train": [*"bcbc"], "validation": [*"aa"]}
    assert divided([*"abc"], ["c", "d"], str, "name")["train"] == ["a", "b"]


def test_a_digest_is_of_all_documents_in_memory():
    documents = [f"document {i}" for i in range(200)]
    digests = {content_of(documents)}
    for number in range(200):
        changed = [*documents]
        changed[number] += "!"
        digests.add(content_of(changed))
    assert len(digests) == 201
    assert content_of([*documents]) in digests
