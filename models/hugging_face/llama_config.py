"""config.json of a Hugging Face LLaMA, to and from `LlamaConfig`."""

from typing import Any

import jax.numpy as jnp

from models.llama.config import LlamaConfig

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


def from_theirs(theirs: dict[str, Any], overrides: dict[str, Any]) -> LlamaConfig:
    """Returns the configuration in a config.json; ValueError if it is not one of our LLaMAs."""
    # Transformers 5 puts theta and type into rope_parameters; before, theta stood at top level and
    # rope_scaling was null or a scaling.
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope parameters {rope!r} are not supported, only an object")
    partial = rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor", 1.0))
    for name, found, accepted in (
        ("model_type", theirs.get("model_type"), "llama"),
        ("hidden_act", theirs.get("hidden_act", "silu"), "silu"),
        ("attention_bias", theirs.get("attention_bias", False), False),
        ("mlp_bias", theirs.get("mlp_bias", False), False),
        ("rope type", rope.get("rope_type", rope.get("type", "default")), "default"),
        ("partial_rotary_factor", partial, 1.0),
        ("quantization_config", theirs.get("quantization_config"), None),
    ):
        if found != accepted:
            raise ValueError(
                f"config.json: {name}={found!r} is not supported, only {accepted!r}; convert the "
                "checkpoint, or load another"
            )

    sizes: dict[str, Any] = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    sizes["num_key_value_heads"] = theirs.get("num_attention_heads")
    sizes |= {name: theirs[name] for name in _SIZES if theirs.get(name) is not None}
    sizes["rope_theta"] = rope.get("rope_theta", theirs.get("rope_theta", 10_000.0))
    for name in (*_SIZES, "rope_theta"):
        value, real = sizes.get(name), name in ("rms_norm_eps", "rope_theta")
        if type(value) is not int and not (real and type(value) is float):
            needed = "a number" if real else "an integer"
            raise ValueError(f"config.json: {name}={value!r}: must be {needed}")
    fields: dict[str, Any] = {ours: sizes[name] for name, ours in _SIZES.items()}
    fields["rope_theta"] = float(sizes["rope_theta"])
    for name, value in overrides.items():
        if name not in (known := LlamaConfig.__dataclass_fields__):
            raise ValueError(
                f"{name}={value!r} is not a field of LlamaConfig; the fields are {', '.join(known)}"
            )
    config = LlamaConfig(**fields | overrides)
    if (theirs.get("head_dim") or config.head_width) != config.head_width:
        raise ValueError(
            f"config.json: head_dim={theirs['head_dim']} is not supported, only hidden_size / "
            f"num_attention_heads, {config.head_width}"
        )
    return config


def to_theirs(config: LlamaConfig) -> dict[str, Any]:
    """Returns the content of config.json, with the keys of transformers 4 and of 5."""
    return {name: getattr(config, ours) for name, ours in _SIZES.items()} | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "head_dim": config.head_width,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "torch_dtype": jnp.dtype(config.param_dtype).name,
        # Ids of special tokens belong to the tokenizer; transformers would assume 1 and 2.
        "bos_token_id": None,
        "eos_token_id": None,
    }
