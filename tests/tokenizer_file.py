"""Tokenizer files for tests."""

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


def write_byte_level(path, vocabulary=257):
    """A tokenizer.json of all bytes, as many unused ids as are asked for, and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    more = [f"extra{i}" for i in range(vocabulary - 257)]
    vocab = {name: i for i, name in enumerate([*characters, *more])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(path))


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
