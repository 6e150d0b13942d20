"""Adafactor with the paper's betas (section 3.1), or AdamW, from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fam_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate schedule: linear warm-up, then constant, or a cosine to zero at `steps`."""
    rate, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        after: optax.Schedule = optax.cosine_decay_schedule(rate, max(1, steps - warmup))
    else:
        after = optax.constant_schedule(rate)
    if warmup == 0:
        return after
    # Start at rate / warmup: a step with rate zero would be wasted.
    rise = optax.linear_schedule(rate / warmup, rate, max(1, warmup - 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Build the optimizer for a nested dict of parameters with stacked "layers"."""
    transform = _adafactor(config, steps) if config.name == "adafactor" else _adamw(config, steps)
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(*parts, per_layer(transform))


def _adafactor(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Build Adafactor (Shazeer and Stern 2018), in the order of optax.adafactor.

    The FAM paper gives beta2 = 0.99, a constant, where Adafactor's own choice is 1 - t^-0.8 ("power" here). It also
    gives a constant learning rate, but does not say whether updates are scaled by the RMS of their parameter. The
    config chooses.
    """
    parts = [
        optax.scale_by_factored_rms(
            decay_rate=config.beta2 if config.beta2_schedule == "constant" else config.beta2_power,
            decay_rate_fn=_debiased_decay if config.beta2_schedule == "constant" else _power_decay,
            min_dim_size_to_factor=config.min_factored_dim,
            epsilon=config.epsilon,
        )
    ]
    if config.block_rms_clip:
        parts.append(optax.clip_by_block_rms(config.block_rms_clip))
    parts.append(optax.scale_by_learning_rate(learning_rate(config, steps), flip_sign=False))
    if config.parameter_scaling:
        parts.append(optax.scale_by_param_block_rms())
    if config.beta1:
        parts.append(optax.ema(config.beta1, debias=False))
    if config.weight_decay:
        rate = learning_rate(config, steps)
        parts.append(
            optax.add_decayed_weights(lambda step: config.weight_decay * rate(step), mask=_is_matrix)
        )
    return optax.chain(*parts, optax.scale(-1))


def _adamw(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    return optax.adamw(
        learning_rate(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=_is_matrix,
    )


def _is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _debiased_decay(step: jax.Array, beta2: float) -> jax.Array:
    """Return the decay of a running mean that equals Adam's debiased one: 0 at first, rising to `beta2`."""
    t = jnp.asarray(step + 1, jnp.float32)
    return beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)


def _power_decay(step: jax.Array, power: float) -> jax.Array:
    return 1 - jnp.asarray(step + 1, jnp.float32) ** -power


def per_layer(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply `transform` to each layer of the stacked "layers" separately, and to the other parameters as they are.

    Otherwise Adafactor would factor and clip across layers, as if a stack (L, D) of norms were one matrix.
    """

    def split(tree: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return tree["layers"], {name: value for name, value in tree.items() if name != "layers"}

    def init(params: dict[str, Any]) -> dict[str, Any]:
        layers, rest = split(params)
        return {"layers": jax.vmap(transform.init)(layers), "rest": transform.init(rest)}

    def update(updates: dict[str, Any], state: dict[str, Any], params: dict[str, Any] | None = None) -> Any:
        assert params is not None
        layer_updates, rest_updates = split(updates)
        layers, rest = split(params)
        new_layers, layer_state = jax.vmap(transform.update)(layer_updates, state["layers"], layers)
        new_rest, rest_state = transform.update(rest_updates, state["rest"], rest)
        return {**new_rest, "layers": new_layers}, {"layers": layer_state, "rest": rest_state}

    return optax.GradientTransformation(init, update)
