"""GaLore (arXiv:2403.03507) as optax transformations, and other ways to train in less memory.

What this module exports is public. The packages below it are private and may change at any time:
`recipes` (whole optimizers), `projection` (the subspace of a leaf), `trace` (what is read from a
traced optimizer), `quantization`, `layerwise` (updates within the backward pass) and `adapters`.
"""

from galore_optax.adapters.base import adapt, join, merge, product, split
from galore_optax.adapters.gradnorm_lorp import GradNormLoRP
from galore_optax.adapters.lora import DoRA, LoRA
from galore_optax.adapters.low_rank import LowRank
from galore_optax.adapters.restart import restart
from galore_optax.explanation import Explanation, explain
from galore_optax.galore import galore
from galore_optax.layerwise.backward import Layered
from galore_optax.layerwise.sharding import layerwise_shardings
from galore_optax.layerwise.step import Layerwise
from galore_optax.layerwise.unstacked import unstacked
from galore_optax.memory import state_bytes
from galore_optax.projection.alice import Alice
from galore_optax.projection.apollo import Apollo
from galore_optax.projection.dimension_numbers import (
    GaLoreDimensionNumbers,
    TuckerDimensionNumbers,
)
from galore_optax.projection.fira import Fira
from galore_optax.projection.recover import Matrix
from galore_optax.projection.schedule import Adaptive, Staggered
from galore_optax.quantization.array import QuantizedArray, quantize_nf4
from galore_optax.quantization.state import cast_state, quantize_state
from galore_optax.quantization.weights import apply_updates, quantize_weights, value_and_grad
from galore_optax.recipes.adafactor import galore_adafactor
from galore_optax.recipes.alice import alice
from galore_optax.recipes.fira_apollo import apollo_adamw, apollo_mini_adamw, fira_adamw
from galore_optax.recipes.galore import (
    adamw8bit,
    galore_adamw,
    galore_adamw8bit,
    q_galore_adamw8bit,
)
from galore_optax.recipes.gradnorm_lorp import gradnorm_lorp_adamw
from galore_optax.recipes.muon import muon
from galore_optax.recipes.racs import racs, scale_by_racs
from galore_optax.recipes.scale import scale_by_columns, scale_sgd
from galore_optax.sharding import state_shardings
from galore_optax.stages import GaLoreState
from galore_optax.transformation import subspace_parts, without_refresh

__version__ = "0.1.0"

__all__ = [
    "Adaptive",
    "Alice",
    "Apollo",
    "DoRA",
    "Explanation",
    "Fira",
    "GaLoreDimensionNumbers",
    "GaLoreState",
    "GradNormLoRP",
    "Layered",
    "Layerwise",
    "LoRA",
    "LowRank",
    "Matrix",
    "QuantizedArray",
    "Staggered",
    "TuckerDimensionNumbers",
    "adamw8bit",
    "adapt",
    "alice",
    "apollo_adamw",
    "apollo_mini_adamw",
    "apply_updates",
    "cast_state",
    "explain",
    "fira_adamw",
    "galore",
    "galore_adafactor",
    "galore_adamw",
    "galore_adamw8bit",
    "gradnorm_lorp_adamw",
    "join",
    "layerwise_shardings",
    "merge",
    "muon",
    "product",
    "q_galore_adamw8bit",
    "quantize_nf4",
    "quantize_state",
    "quantize_weights",
    "racs",
    "restart",
    "scale_by_columns",
    "scale_by_racs",
    "scale_sgd",
    "split",
    "state_bytes",
    "state_shardings",
    "subspace_parts",
    "unstacked",
    "value_and_grad",
    "without_refresh",
]
