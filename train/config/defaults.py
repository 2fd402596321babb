"""The table of defaults that depend on the model, such as its learning rate.

GaLore's and Q-GaLore's rank, gap and learning rate, steps, batch and length are the papers';
AdamW's learning rates and all of `tiny` are ours. `galore`, `q_galore` and `full` are the learning
rates of the optimizers of each family. `adamw_state` is the dtype of AdamW's moments of
bfloat16 weights: for a 7B model, float32 ones would take 54 GB, and no longer fit 80 GB.
"""

from collections.abc import Mapping
from typing import Any

# Where a model has no other value.
PAPER = dict(
    update_proj_gap=200, scale=0.25, galore=0.01, q_galore=0.01, full=0.001,
    batch_size=512, microbatch=None, seq_len=256, dtype="float32", rematerialize=False,
    adamw_state="float32",
)  # fmt: skip
# For fine-tuning a language model of any size. Full fine-tuning has the learning rate and epochs
# of Alpaca (2e-5, 3; github.com/tatsu-lab/stanford_alpaca), adapters QLoRA's learning rate for 7B
# (2e-4; arXiv:2305.14314, appendix B). GaLore fine-tunes with AdamW's learning rate, and at rank 8
# with the scale 2 (arXiv:2403.03507, appendix D), unlike in pre-training.
FINETUNING = dict(
    PAPER, scale=2.0, galore=2e-5, q_galore=2e-5, full=2e-5, adapters=2e-4,
    batch_size=16, microbatch=4, seq_len=512, epochs=3.0, adapter_rank=16,
)  # fmt: skip
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "tiny": dict(
        rank=32, update_proj_gap=100, galore=0.02, q_galore=0.02, full=0.001,
        steps=300, batch_size=16, seq_len=128, microbatch=None,
    ),
    "llama-60m": dict(rank=128, q_galore=0.015, steps=10_000, microbatch=128),
    "llama-130m": dict(rank=256, q_galore=0.015, steps=20_000, microbatch=64),
    "llama-350m": dict(rank=256, steps=60_000, microbatch=32),
    "llama-1b": dict(rank=512, steps=100_000, microbatch=16, full=0.0005),
    "llama-7b": dict(
        rank=1024, update_proj_gap=500, galore=0.005, q_galore=0.004, full=0.0005,
        steps=150_000, microbatch=16, dtype="bfloat16", rematerialize=True, adamw_state="bfloat16",
    ),
}  # fmt: skip
