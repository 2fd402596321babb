"""config.json of a Hugging Face LLaMA, to and from `LlamaConfig`."""

from typing import Any

import jax.numpy as jnp

from models.llama.config import LlamaConfig, TokenIds
from models.llama.rope import RopeScaling

# Our sizes by their names there.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "norm_eps",
}
# Keys with their own rules below.
_ROPE = {"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"}
_TOKEN_IDS = {name: f"{name}_token_id" for name in TokenIds._fields}
_READ = {*_SIZES, *_ROPE, *_TOKEN_IDS.values(), "model_type", "head_dim", "sliding_window"}
DTYPES = ("float32", "bfloat16", "float16", "float64")
# What transformers takes for a key that is absent, by the type of the model.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "sliding_window": None},
    "mistral": {
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "sliding_window": 4096,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
# Fields of a scaling of rotary frequencies by their names there, and the names that each kind has.
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_length",
}
_SCALED_BY = {"default": set(), "linear": {"factor"}, "dynamic": {"factor"}, "llama3": {*_SCALING}}
# Keys that could change the function, with the values that do not; a null is as no key.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "architectures": ([], ["LlamaForCausalLM"], ["LLaMAForCausalLM"]),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, True),
    "mlp_bias": (False, True),
    "attention_dropout": (0.0,),
    "hidden_dropout": (0.0,),
    "tie_word_embeddings": (False, True),
    "quantization_config": (),
    "auto_map": ({},),  # code of its own
    "pruned_heads": ({},),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    # Of SmolLM.
    "is_llama_config": (True,),
    "rope_interleaved": (False,),
    "dtype": DTYPES,
    "torch_dtype": DTYPES,
}
# A Mistral never has biases, whatever its config.json says.
_ACCEPTED_OF_MISTRAL: dict[str, tuple[Any, ...]] = _ACCEPTED | {
    "architectures": ([], ["MistralForCausalLM"]),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}
# Keys of transformers 4 and 5 that leave the logits as they are: of training, generation, labels,
# the tokenizer and the library itself.
NO_EFFECT = {
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "_commit_hash", "_flash_attn_2_enabled", "_name_or_path", "attn_implementation",
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing",
    "id2label", "initializer_range", "label2id", "length_penalty", "max_length",
    "max_sequence_length", "min_length", "model_max_length", "name_or_path", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_labels", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params",
    "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p",
    "torchscript", "transformers.js_config", "transformers_version", "typical_p", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache", "use_flash_attention",
}  # fmt: skip


def from_theirs(theirs: dict[str, Any], overrides: dict[str, Any]) -> LlamaConfig:
    """Returns the configuration in a config.json; ValueError if it is not one of our LLaMAs.

    ValueError also if it has a key that is not known here, or two keys that contradict each other.
    """
    kind = theirs.get("model_type")
    check("model_type", kind, (*_DEFAULTS,))
    theirs = _DEFAULTS[str(kind)] | theirs
    check("sliding_window", theirs["sliding_window"], (None,))
    if theirs.get("num_key_value_heads") is None:
        theirs["num_key_value_heads"] = theirs.get("num_attention_heads")
    theirs = {k: v for k, v in theirs.items() if v is not None or k == "rope_theta"}
    accepted = _ACCEPTED_OF_MISTRAL if kind == "mistral" else _ACCEPTED
    for name in accepted.keys() & theirs.keys():
        check(name, theirs[name], accepted[name])
    check_known(theirs, _READ | {*_ACCEPTED} | NO_EFFECT)
    check_agreement({x: theirs[x] for x in ("dtype", "torch_dtype") if x in theirs})

    for name in _SIZES:
        check_number(name, theirs.get(name), real=name == "rms_norm_eps")
    fields: dict[str, Any] = {ours: theirs[name] for name, ours in _SIZES.items()}
    fields["rope_theta"], scaling = _rope(theirs)
    fields["rope_scaling"] = scaling
    if scaling is not None and scaling.kind == "dynamic":  # the model is to exceed this length
        fields["max_length"] = int(scaling.factor * theirs["max_position_embeddings"])
    if "head_dim" in theirs:
        check_number("head_dim", theirs["head_dim"])
        implied = fields["width"] / fields["heads"]
        fields["head_dim"] = None if theirs["head_dim"] == implied else theirs["head_dim"]
    fields["tied"] = theirs.get("tie_word_embeddings", False)
    fields |= {name: theirs.get(name, False) for name in ("attention_bias", "mlp_bias")}
    fields["token_ids"] = TokenIds(**{k: _ids(x, theirs.get(x)) for k, x in _TOKEN_IDS.items()})
    for name, value in overrides.items():
        if name not in (known := LlamaConfig.__dataclass_fields__):
            raise ValueError(
                f"{name}={value!r} is not a field of LlamaConfig; the fields are {', '.join(known)}"
            )
    return LlamaConfig(**fields | overrides)


def _ids(name: str, value: Any) -> int | tuple[int, ...] | None:
    """The id of a special token, or of several; ValueError if it is something else."""
    several = tuple(value) if isinstance(value, list) else (value,)
    if value is not None and not all(type(x) is int for x in several):
        raise ValueError(f"config.json: {name}={value!r}: must be an integer or a list of these")
    return several if isinstance(value, list) else value


def _rope(theirs: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Returns base and scaling of the rotary frequencies; all places that have one must agree."""
    # Transformers 5 puts theta and scaling into rope_parameters; before, theta stood at top level
    # and rope_scaling was null or a scaling. It reads files that have all three.
    top = {k: theirs[k] for k in ("rope_theta", "partial_rotary_factor") if k in theirs}
    found: dict[str, dict[str, Any]] = {name: {name: value} for name, value in top.items()}
    for key in ("rope_parameters", "rope_scaling"):
        rope = theirs.get(key, {})
        if not isinstance(rope, dict):
            raise ValueError(f"config.json: {key}={rope!r} is not supported, only an object")
        for name, value in rope.items():
            same = "rope_type" if name == "type" else name  # its older name
            if value is not None or name == "rope_theta":
                found.setdefault(same, {})[f"{key}.{name}"] = value
    for places in found.values():
        check_agreement(places)
    said = {same: next(iter(places.items())) for same, places in found.items()}
    place, kind = said.pop("rope_type", ("rope_type", "default"))
    check(place, kind, (*_SCALED_BY,))
    theta = said.pop("rope_theta", ("rope_theta", 10_000.0))
    check_number(*theta, real=True)
    check(*said.pop("partial_rotary_factor", ("partial_rotary_factor", 1.0)), (1.0,))
    fields: dict[str, Any] = {}
    if kind == "dynamic":
        fields["original_length"] = theirs["max_position_embeddings"]
    for same, (name, value) in said.items():
        if same not in _SCALED_BY[kind]:
            check(name, value, ())
        check_number(name, value, real=same != "original_max_position_embeddings")
        fields[_SCALING[same]] = value
    if absent := sorted(_SCALED_BY[kind] - said.keys()):
        raise ValueError(
            f"config.json: {place}={kind!r} has no {absent[0]}; write it down there, it changes "
            "what the model computes"
        )
    if theirs.get("rope_scaling"):  # transformers then passes over rope_parameters
        for same, places in found.items():
            if all(place.startswith("rope_parameters.") for place in places):
                raise ValueError(
                    f"config.json: rope_parameters.{same} is not in rope_scaling, which is read "
                    "where both are there; write it there, too, or delete the wrong one"
                )
    return float(theta[1]), None if kind == "default" else RopeScaling(kind, **fields)


def check_number(name: str, value: Any, *, real: bool = False) -> None:
    """Raises ValueError unless a value is a positive integer or, if `real`, number below 2**63."""
    if type(value) is not int and not (real and type(value) is float):
        needed = "a number" if real else "an integer"
        raise ValueError(f"config.json: {name}={value!r}: must be {needed}")
    if not 0 < value < 2**63:
        raise ValueError(f"config.json: {name}={value!r}: must be positive and finite, below 2**63")


def check(name: str, found: Any, accepted: tuple[Any, ...]) -> None:
    """Raises ValueError unless a value is accepted; 0 is 0.0, but not false."""
    if not any(found == x and isinstance(found, bool) == isinstance(x, bool) for x in accepted):
        only = f", only {' or '.join(map(repr, accepted))}" if accepted else ""
        raise ValueError(
            f"config.json: {name}={found!r} is not supported{only}; convert the checkpoint, or "
            "load another"
        )


def check_known(theirs: dict[str, Any], known: set[str]) -> None:
    """Raises ValueError if a config.json has a key that is not known."""
    if unknown := sorted({*theirs} - known):
        raise ValueError(
            f"config.json: {unknown[0]}={theirs[unknown[0]]!r} is not known here and could change "
            "what the model computes; delete it if it does not, or load another checkpoint"
        )


def check_agreement(found: dict[str, Any]) -> None:
    """Raises ValueError if places that have the same value, by name, differ."""
    for name, value in found.items():
        first, expected = next(iter(found.items()))
        if value != expected:
            raise ValueError(
                f"config.json contradicts itself: {first}={expected!r} and {name}={value!r}; "
                "delete the wrong one"
            )


def to_theirs(config: LlamaConfig) -> dict[str, Any]:
    """Returns the content of config.json, with the keys of transformers 4 and of 5."""
    scaling, rope = config.rope_scaling, {}
    if scaling is not None:
        rope = {name: getattr(scaling, _SCALING[name]) for name in _SCALED_BY[scaling.kind]}
    sizes = {name: getattr(config, ours) for name, ours in _SIZES.items()}
    if scaling is not None and scaling.kind == "dynamic":
        sizes["max_position_embeddings"] = scaling.original_length
    rope = {"rope_type": "default" if scaling is None else scaling.kind, **rope}
    return sizes | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "head_dim": config.head_width,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tied,
        "rope_theta": config.rope_theta,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rope_scaling": None if scaling is None else rope,
        "torch_dtype": jnp.dtype(config.param_dtype).name,
        # Transformers would assume 1 and 2 if there were no keys.
        **{x: getattr(config.token_ids, k) for k, x in _TOKEN_IDS.items()},
    }
