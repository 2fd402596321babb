"""A tokenizer.json for tests."""

import json


def write_tokenizer(path, vocabulary, special=(), ordinary=(), **settings):
    """A word-level tokenizer.json, whose vocabulary lists the special tokens too."""
    added = [
        {
            "id": vocabulary[name],
            "content": name,
            "special": name in special,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for name in (*special, *ordinary)
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    path.write_text(json.dumps(content | settings))
    return path


def with_first(name, token):
    """A post-processor that puts a token before a text."""
    first = {"SpecialToken": {"id": name, "type_id": 0}}
    a, b = ({"Sequence": {"id": x, "type_id": 0}} for x in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [first, a],
        "pair": [first, a, b],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }
