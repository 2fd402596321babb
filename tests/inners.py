"""Every optimizer and building block of optax as an inner transformation, and a loss to lower."""

import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib

TARGET = {
    "w": jax.random.normal(jax.random.key(0), (6, 8)),
    "layers": jax.random.normal(jax.random.key(1), (2, 7, 5)),
    "bias": jnp.linspace(-1.0, 1.0, 5),
    "gain": jnp.asarray(2.0),
    "nothing": {},
}
START = jax.tree.map(lambda x: 0.5 * x + 0.5, TARGET)


def loss(params):
    return sum(jnp.sum((x - TARGET[k]) ** 2) / 2 for k, x in params.items() if k != "nothing")


def size(params):
    """A function of params of any shape, as inners that want one are given projected params."""
    return optax.tree.norm(params, squared=True) / 2


# Every optimizer with a learning rate at which a parabola's loss falls within eight steps.
OPTIMIZERS = {
    "adabelief": optax.adabelief(0.05),
    "adadelta": optax.adadelta(1.0),
    "adafactor": optax.adafactor(0.05),
    "adagrad": optax.adagrad(0.1),
    "adam": optax.adam(0.05),
    "adamax": optax.adamax(0.05),
    "adamaxw": optax.adamaxw(0.05),
    "adamw": optax.adamw(0.05),
    "adan": optax.adan(0.05),
    "amsgrad": optax.amsgrad(0.05),
    "fromage": optax.fromage(0.02),
    "lamb": optax.lamb(0.05),
    "lars": optax.lars(1.0),
    "lbfgs": optax.lbfgs(0.1, linesearch=None),
    "lion": optax.lion(0.02),
    "nadam": optax.nadam(0.05),
    "nadamw": optax.nadamw(0.05),
    "noisy_sgd": optax.noisy_sgd(0.1, key=0),
    "novograd": optax.novograd(0.05),
    "optimistic_adam_v2": optax.optimistic_adam_v2(0.05),
    "optimistic_gradient_descent": optax.optimistic_gradient_descent(0.1),
    "polyak_sgd": optax.polyak_sgd(),
    "radam": optax.radam(0.05),
    "rmsprop": optax.rmsprop(0.02),
    "rprop": optax.rprop(0.02),
    "sgd": optax.sgd(0.1, momentum=0.9),
    "sign_sgd": optax.sign_sgd(0.02),
    "signum": optax.signum(0.02),
    "sm3": optax.sm3(0.1),
    "yogi": optax.yogi(0.05),
    "acprop": contrib.acprop(0.02),
    "ademamix": contrib.ademamix(0.02),
    "adopt": contrib.adopt(0.02),
    "cocob": contrib.cocob(),
    "dadapt_adamw": contrib.dadapt_adamw(1.0),
    "dog": contrib.dog(1.0),
    "dowg": contrib.dowg(1.0),
    "galore": contrib.galore(0.02, rank=2),
    "madgrad": contrib.madgrad(0.02),
    "momo": contrib.momo(0.2),
    "momo_adam": contrib.momo_adam(0.05),
    "muon": contrib.muon(0.05),
    "prodigy": contrib.prodigy(1.0),
    "schedule_free_adamw": contrib.schedule_free_adamw(0.05),
    "schedule_free_sgd": contrib.schedule_free_sgd(0.2),
    "simplified_ademamix": contrib.simplified_ademamix(1e-3),
    "sophia": contrib.sophia(0.02),
}
# What optimizers are built of. Each is followed by a step downhill.
BUILDING_BLOCKS = {
    "adaptive_grad_clip": optax.adaptive_grad_clip(1.0),
    "add_decayed_weights": optax.add_decayed_weights(0.01),
    "add_noise": optax.add_noise(0.01, 0.55, key=0),
    "apply_every": optax.apply_every(2),
    "centralize": optax.centralize(),
    "clip": optax.clip(1.0),
    "clip_by_block_rms": optax.clip_by_block_rms(1.0),
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "ema": optax.ema(0.9),
    "identity": optax.identity(),
    "normalize": contrib.normalize(),
    "normalize_by_update_norm": optax.normalize_by_update_norm(),
    "reduce_on_plateau": contrib.reduce_on_plateau(),
    "scale": optax.scale(0.5),
    "scale_by_acprop": optax.chain(contrib.scale_by_acprop(), optax.scale(0.2)),
    "scale_by_adadelta": optax.scale_by_adadelta(),
    "scale_by_adam": optax.scale_by_adam(),
    "scale_by_adamax": optax.scale_by_adamax(),
    "scale_by_adan": optax.scale_by_adan(),
    "scale_by_ademamix": contrib.scale_by_ademamix(),
    "scale_by_adopt": contrib.scale_by_adopt(),
    "scale_by_amsgrad": optax.scale_by_amsgrad(),
    "scale_by_belief": optax.scale_by_belief(),
    "scale_by_cocob": optax.chain(contrib.scale_by_cocob(), optax.scale(-10.0)),
    "scale_by_distance_over_gradients": optax.scale_by_distance_over_gradients(),
    "scale_by_factored_rms": optax.scale_by_factored_rms(min_dim_size_to_factor=2),
    "scale_by_galore": contrib.scale_by_galore(rank=2),
    "scale_by_lbfgs": optax.scale_by_lbfgs(),
    "scale_by_learning_rate": optax.scale_by_learning_rate(0.5, flip_sign=False),
    "scale_by_lion": optax.scale_by_lion(),
    "scale_by_madgrad": optax.chain(contrib.scale_by_madgrad(0.02), optax.scale(-10.0)),
    "scale_by_novograd": optax.scale_by_novograd(),
    "scale_by_optimistic_gradient": optax.scale_by_optimistic_gradient(),
    "scale_by_param_block_norm": optax.scale_by_param_block_norm(),
    "scale_by_param_block_rms": optax.scale_by_param_block_rms(),
    "scale_by_polyak": optax.scale_by_polyak(),
    "scale_by_radam": optax.scale_by_radam(),
    "scale_by_rms": optax.scale_by_rms(),
    "scale_by_rprop": optax.scale_by_rprop(0.1),
    "scale_by_rss": optax.scale_by_rss(),
    "scale_by_schedule": optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, 10)),
    "scale_by_sign": optax.scale_by_sign(),
    "scale_by_simplified_ademamix": optax.chain(
        contrib.scale_by_simplified_ademamix(), optax.scale(0.05)
    ),
    "scale_by_sm3": optax.scale_by_sm3(),
    "scale_by_stddev": optax.scale_by_stddev(),
    "scale_by_trust_ratio": optax.scale_by_trust_ratio(),
    "scale_by_yogi": optax.scale_by_yogi(),
    "snapshot": optax.snapshot("norm", optax.tree.norm),
    "stateless": optax.stateless(lambda updates, params: updates),
    "stateless_with_tree_map": optax.stateless_with_tree_map(lambda update, param: update),
    "trace": optax.trace(0.9),
    "zero_nans": optax.zero_nans(),
}
INNERS = OPTIMIZERS | {
    name: optax.chain(block, optax.scale(-0.1)) for name, block in BUILDING_BLOCKS.items()
}
REMEMBER_PARAMS = {
    "cocob",
    "dog",
    "dowg",
    "lbfgs",
    "madgrad",
    "prodigy",
    "scale_by_cocob",
    "scale_by_distance_over_gradients",
    "scale_by_lbfgs",
    "scale_by_madgrad",
    "schedule_free_adamw",
    "schedule_free_sgd",
}
# These use params in norms only. Of the others, and of inners whose state is not understood,
# `galore` warns.
BY_SCALARS = {"dog", "dowg", "scale_by_distance_over_gradients"}
WARN = {"galore", "scale_by_galore", "sophia", "adaptive_grad_clip"} | REMEMBER_PARAMS - BY_SCALARS
FEW = {"w": START["w"], "bias": START["bias"]}


def arguments(name, value):
    """The extra arguments that an inner wants."""
    if name in ("momo", "momo_adam", "polyak_sgd", "reduce_on_plateau", "scale_by_polyak"):
        return {"value": value}
    return {"obj_fn": size} if name == "sophia" else {}


def run(tx, params, grads):
    """Params after each of the gradients."""
    state = tx.init(params)
    update = jax.jit(tx.update)
    trajectory = []
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def inside_galore(names):
    """Names as parameters of a test, in which the warnings that are known are let pass."""
    quiet = pytest.mark.filterwarnings("ignore:galore:UserWarning")
    return [pytest.param(n, marks=quiet) if n in WARN else n for n in sorted(names)]


def parts_slow(cases):
    """The same parameters of a test, of which `scale_by_NAME` is slow if `NAME` is there too."""
    named = [(case if isinstance(case, str) else case.values[0], case) for case in cases]
    names = {name for name, _ in named}

    def marked(name, case):
        if name.removeprefix("scale_by_") not in names - {name}:
            return case
        marks = () if isinstance(case, str) else case.marks
        return pytest.param(name, marks=[*marks, pytest.mark.slow])

    return [marked(name, case) for name, case in named]
