"""config.json of a Hugging Face RoBERTa or BERT, to and from `EncoderConfig`."""

from typing import Any

import jax.numpy as jnp

from models.encoder.config import EncoderConfig
from models.hugging_face.llama_config import (
    DTYPES,
    NO_EFFECT,
    check,
    check_agreement,
    check_known,
    check_number,
)

# Our fields by their names there.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "max_position_embeddings": "positions",
    "type_vocab_size": "token_types",
}
_DROPOUTS = {
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "classifier_dropout": "classifier_dropout",
}
_READ = {*_SIZES, *_DROPOUTS, "layer_norm_eps", "pad_token_id", "model_type"}
# What transformers takes for a key that is absent, by the type of the model.
_COMMON = {
    "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
_DEFAULTS = {"roberta": {**_COMMON, "pad_token_id": 1}, "bert": {**_COMMON, "pad_token_id": 0}}
_KINDS = {"roberta": "Roberta", "bert": "Bert"}
_HEADS = ("Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification")
# Keys that could change the function, with the values that do not; a null is as no key.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
    "quantization_config": (),
    "auto_map": ({},),  # code of its own
    "pruned_heads": ({},),
    "is_encoder_decoder": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "tie_word_embeddings": (True, False),  # of a language model's head, which is not read
    "dtype": DTYPES,
    "torch_dtype": DTYPES,
}
# Keys of BERT's first checkpoints that no code reads.
_OLD = {
    "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
    "pooler_size_per_head", "pooler_type",
}  # fmt: skip


def from_theirs(theirs: dict[str, Any], overrides: dict[str, Any]) -> EncoderConfig:
    """Returns the configuration in a config.json, without pooler and classifier.

    `overrides` are further fields of `EncoderConfig`. ValueError if it is not that of a RoBERTa or
    BERT, or has a key that is not known here.
    """
    kind = theirs.get("model_type")
    check("model_type", kind, (*_DEFAULTS,))
    theirs = _DEFAULTS[str(kind)] | {k: v for k, v in theirs.items() if v is not None}
    known = [[], *([_KINDS[str(kind)] + head] for head in _HEADS)]
    for name, accepted in (_ACCEPTED | {"architectures": tuple(known)}).items():
        if name in theirs:
            check(name, theirs[name], accepted)
    check_known(theirs, _READ | {*_ACCEPTED, "architectures"} | NO_EFFECT | _OLD)
    check_agreement({x: theirs[x] for x in ("dtype", "torch_dtype") if x in theirs})
    for name in _SIZES:
        check_number(name, theirs.get(name))
    check_number("layer_norm_eps", theirs["layer_norm_eps"], real=True)
    theirs.setdefault("classifier_dropout", theirs["hidden_dropout_prob"])
    for name in _DROPOUTS:
        if type(theirs[name]) not in (int, float):
            raise ValueError(f"config.json: {name}={theirs[name]!r}: must be a number")
    fields: dict[str, Any] = {ours: theirs[name] for name, ours in (_SIZES | _DROPOUTS).items()}
    fields["norm_eps"] = theirs["layer_norm_eps"]
    if kind == "roberta":
        if type(pad := theirs["pad_token_id"]) is not int or pad < 0:
            raise ValueError(f"config.json: pad_token_id={pad!r}: must be an integer from 0")
        fields["pad_id"] = pad
    for name, value in overrides.items():
        if name not in (allowed := EncoderConfig.__dataclass_fields__):
            raise ValueError(
                f"{name}={value!r} is not a field of EncoderConfig; the fields are "
                + ", ".join(allowed)
            )
    return EncoderConfig(**fields | overrides)


def check_labels(theirs: dict[str, Any], classes: int, name: str) -> None:
    """Raises ValueError if a config.json names other labels than those of a classifier's classes.

    `name` is that of the classifier's tensor.
    """
    keys = ("num_labels", "id2label", "label2id")
    said = {key: theirs[key] for key in keys if theirs.get(key) is not None}
    for key, value in said.items():
        count = value if key == "num_labels" else isinstance(value, dict) and len(value)
        if type(count) is not int or count != classes:
            raise ValueError(
                f"config.json: {key}={value!r}, but {name} has {classes} rows, one for each label: "
                "correct the one that is wrong"
            )
    if {"id2label", "label2id"} <= said.keys():
        names, ids = ({str(x): str(y) for x, y in said[key].items()} for key in keys[1:])
        if names != {i: label for label, i in ids.items()}:
            raise ValueError(
                f"config.json: id2label={names} and label2id={ids} contradict each other: correct "
                "the one that is wrong"
            )


def to_theirs(config: EncoderConfig) -> dict[str, Any]:
    """Returns the content of config.json."""
    kind = "bert" if config.pad_id is None else "roberta"
    head = "ForSequenceClassification" if config.classes else "Model"
    labels = {str(i): f"LABEL_{i}" for i in range(config.classes)}
    names = {"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}}
    return {name: getattr(config, ours) for name, ours in (_SIZES | _DROPOUTS).items()} | {
        "architectures": [_KINDS[kind] + head],
        "model_type": kind,
        "hidden_act": "gelu",
        "layer_norm_eps": config.norm_eps,
        "pad_token_id": 0 if config.pad_id is None else config.pad_id,
        "torch_dtype": jnp.dtype(config.param_dtype).name,
        **(names if config.classes else {}),
    }
