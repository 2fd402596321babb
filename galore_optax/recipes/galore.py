"""GaLore around AdamW, and AdamW in 8 bits."""

import inspect
from typing import Any

import optax

from galore_optax import checks
from galore_optax.galore import galore
from galore_optax.projection.leaf import Rank
from galore_optax.projection.schedule import Adaptive
from galore_optax.recipes.options import adamw, renamed, with_options_of


@with_options_of(adamw, galore)
def galore_adamw(
    learning_rate: optax.ScalarOrSchedule, rank: Rank, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """GaLore with AdamW: the recipe of the paper's pre-training runs.

    `galore_adamw8bit` is the same with `bits=8`, the paper's recipe for a 7B model.
    `q_galore_adamw8bit`, Q-GaLore, is that with bases in 4 bits and adaptive refreshes,
    `projection_bits=4, update_proj_gap=Adaptive(200)`; its weights are quantized by
    `quantize_weights`, and updated with stochastic rounding by `apply_updates`.

    Args:
        learning_rate: Learning rate or schedule. The papers pre-train with 0.01 (7B: 0.005),
            Q-GaLore with 0.015 to 0.004, by size.
        rank: Dimensions of the subspace; the paper uses a quarter to a half of the width.
        b1: Decay rate of the first moment.
        b2: Decay rate of the second moment.
        eps: Added to the root of the second moment.
        eps_root: Added to the second moment within the root.
        mu_dtype: Dtype of the first moment; None takes the params'.
        weight_decay: Decoupled weight decay or a schedule of it, times the learning rate, of the
            whole matrix and without the scale.
        mask: Which leaves decay: a tree of booleans, a prefix of the params' tree, or a function
            that returns one from params of the shapes that the moments have; None: all.
        nesterov: Whether the first moment is Nesterov's.
        bits: Stores the moments in 8 or 4 bits (`quantize_state`); None as floats.
        state_dtype: Dtype in which moments that are floats are stored and computed (`cast_state`);
            None takes the params'. With bfloat16 params give jnp.float32: second moments in
            bfloat16 cannot decay.
        **options: The other arguments of `galore`.

    References:
        Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, section 4.3, appendix C;
        Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024, algorithm 1.

    Examples:
        >>> import jax, jax.numpy as jnp, galore_optax
        >>> params = grads = {"w": jnp.ones((64, 256))}
        >>> state = galore_optax.galore_adamw(0.01, rank=16, update_proj_gap=100).init(params)
        >>> state.inner[0].mu["w"].nbytes  # of 16 x 256 moments
        16384
        >>> galore_optax.galore_adamw8bit(0.01, rank=16).init(params).inner[0].mu["w"].nbytes
        4160

        Q-GaLore; gradients are with respect to the dequantized weights:

        >>> params = galore_optax.quantize_weights(params)
        >>> tx = galore_optax.q_galore_adamw8bit(0.01, rank=16)
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> params = galore_optax.apply_updates(params, updates, jax.random.key(0))
    """
    of_adamw = {k: options.pop(k) for k in inspect.signature(adamw).parameters if k in options}
    return galore(rank, adamw(learning_rate, **of_adamw), **options)


galore_adamw8bit = renamed(galore_adamw, "galore_adamw8bit", bits=8)
_q_galore = {"bits": 8, "projection_bits": 4, "update_proj_gap": Adaptive(200)}
q_galore_adamw8bit = renamed(galore_adamw, "q_galore_adamw8bit", **_q_galore)


@with_options_of(adamw)
def adamw8bit(
    learning_rate: optax.ScalarOrSchedule, *, bits: int = 8, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """AdamW at full rank with moments stored in 8 bits (`bits=4`: in 4).

    Options are those of `optax.adamw`, but for dtypes of moments; see `galore_adamw`.

    References:
        Dettmers et al., `8-bit Optimizers <https://arxiv.org/abs/2110.02861>`_, 2021.

    Examples:
        >>> import jax.numpy as jnp
        >>> from galore_optax import adamw8bit
        >>> state = adamw8bit(1e-3).init({"w": jnp.ones((64, 256))})
        >>> state[0].mu["w"].nbytes
        16640
    """
    checks.choice(bits, "bits", (8, 4))
    return adamw(learning_rate, bits=bits, **options)
