"""Measure training speed: FAM against BSWA, the library against a naive implementation, and the parts of FAM's time.

Each comparison runs its sides alternately in one process and reports median and quartiles of ratios within a round:

- memory: a training step with FAM (M = C / 16) against one with BSWA, both with m = 1. `benchmarks.arithmetic` gives
  the ratio that follows from the number of operations.
- gradients: loss, and loss with gradients, of the library, of the scan over blocks in `benchmarks.naive` and of BSWA;
  and the FAM chain of one layer, with weight gradients deferred or added up block by block. Before timing, it checks
  that the library and the naive implementation give the same loss and gradients.
- attention: block attention and its gradients in XLA against the dense reference.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.arithmetic import count_flops
from benchmarks.chain import chain_calls
from benchmarks.naive import naive_hidden
from benchmarks.record import write_record
from benchmarks.report import print_training
from benchmarks.timing import Times, interleave
from benchmarks.workload import (
    FULL,
    QUICK,
    TOKENS_PER_FAM,
    Workload,
    make_loss,
    random_batch,
    random_parameters,
    training_call,
    with_blocks,
)
from fam_jax.config import UserError
from fam_jax.kernels import BlockInputs, BlockOptions, block_attention
from launch.cli import ArgumentParser
from launch.errors import user_errors

SIZES = (64, 128, 256, 512, 1024)
QUICK_SIZES = (16,)
SECONDS = 300.0
# Largest differences between two implementations; see `_difference`.
TOLERANCES = {"loss": 1e-4, "gradient": 1e-3}


def compare_memory(work: Workload, size: int, seconds: float) -> dict[str, Any]:
    """Compare training steps of two models, with and without FAM."""
    batch = random_batch(work)
    models = {"fam": with_blocks(work.model, size), "bswa": with_blocks(work.model, size, fam=False)}
    times = interleave({name: training_call(work, model, batch) for name, model in models.items()}, seconds)
    flops = {name: count_flops(model, work.batch, work.length) for name, model in models.items()}
    return {
        "seconds": times.seconds(),
        "tokens_per_second": {
            name: times.over_rounds(lambda t, name=name: work.tokens / t[name])  # type: ignore[misc]
            for name in models
        },
        "ratio": times.ratio("fam", "bswa"),
        "expected_ratio": flops["fam"].ratio,
        "fam_length": models["fam"].memory.chained_rows,
        "fam_per_token": models["fam"].memory.chained_rows / size,
        "flops": flops,
    }


def compare_attention(work: Workload, size: int, seconds: float) -> dict[str, Any]:
    """Compare implementations of block attention with gradients, on random activations."""
    model = with_blocks(work.model, size)
    heads, kv_heads = (model.num_heads, model.head_dim), (model.num_kv_heads, model.head_dim)
    blocks = work.length // size
    keys = jax.random.split(jax.random.key(work.seed), 5)
    shapes = (
        (work.batch, work.length, *heads),
        *[(work.batch, work.length, *kv_heads)] * 2,
        *[(work.batch, blocks, model.memory.extra_keys, *kv_heads)] * 2,
    )
    arrays = tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    extra_count = jnp.full((work.batch, blocks), model.memory.extra_keys)

    def step(implementation: str) -> Callable[..., Any]:
        def loss(
            q: jax.Array, k: jax.Array, v: jax.Array, extra_k: jax.Array, extra_v: jax.Array
        ) -> jax.Array:
            inputs = BlockInputs(q, k, v, extra_k, extra_v, extra_count=extra_count)
            options = BlockOptions(size, model.memory_segments)
            out = block_attention(inputs, options, implementation=implementation)
            return jnp.vdot(out, out)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)))

    times = interleave(_calls({name: step(name) for name in ("xla", "reference")}, *arrays), seconds)
    return {"seconds": times.seconds(), "ratio": times.ratio("reference", "xla")}


def compare_gradients(work: Workload, size: int, seconds: float) -> dict[str, Any]:
    """Compare losses and gradients of the library, of the naive implementation and of BSWA, and chains of one layer.

    Raises:
      AssertionError: the library and the naive implementation differ.
    """
    model, batch = with_blocks(work.model, size), random_batch(work)
    bswa = with_blocks(work.model, size, fam=False)
    params, bswa_params = random_parameters(model, work.seed), random_parameters(bswa, work.seed)
    losses = {"fam": make_loss(model), "naive": make_loss(model, naive_hidden)}
    gradients = {f"{name}_gradient": jax.jit(jax.value_and_grad(loss)) for name, loss in losses.items()}
    difference = _difference(*(gradient(params, batch) for gradient in gradients.values()))
    agree = all(difference[name] <= tolerance for name, tolerance in TOLERANCES.items())
    assert agree, f"the two forms differ at C = {size}: {difference}"
    bswa_loss = make_loss(bswa)
    times = interleave(
        _calls({"bswa_forward": jax.jit(bswa_loss)}, bswa_params, batch)
        | _calls({"fam_forward": jax.jit(losses["fam"])}, params, batch)
        | _calls({"bswa_gradient": jax.jit(jax.value_and_grad(bswa_loss))}, bswa_params, batch)
        | _calls(gradients, params, batch)
        | chain_calls(work, model, params),
        seconds,
    )
    return {
        "seconds": times.seconds(),
        "naive_ratio": times.ratio("naive_gradient", "fam_gradient"),
        "difference": difference,
        **_shares(times, work.model.num_layers),
    }


def _difference(one: Any, other: Any) -> dict[str, float]:
    """Return the differences of two (loss, gradients), in nats and relative to the largest gradient of a parameter."""

    def relative(a: jax.Array, b: jax.Array) -> float:
        return float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(a).max(), 1e-12))

    return {
        "loss": abs(float(one[0] - other[0])),
        "gradient": max(jax.tree.leaves(jax.tree.map(relative, one[1], other[1]))),
    }


def _shares(times: Times, layers: int) -> dict[str, Any]:
    """Return ratios and seconds per batch; "backward" is the time of loss and gradients minus that of the loss."""
    return {
        "forward_ratio": times.ratio("fam_forward", "bswa_forward"),
        "gradient_ratio": times.ratio("fam_gradient", "bswa_gradient"),
        "forward_overhead": times.over_rounds(lambda t: t["fam_forward"] - t["bswa_forward"]),
        "backward_overhead": times.over_rounds(
            lambda t: (t["fam_gradient"] - t["fam_forward"]) - (t["bswa_gradient"] - t["bswa_forward"])
        ),
        "all_chains_forward": times.over_rounds(lambda t: layers * t["chain_forward"]),
        "all_chains_backward": times.over_rounds(
            lambda t: layers * (t["chain_gradient"] - t["chain_forward"])
        ),
        "deferral_ratio": times.ratio("chain_gradient_plain", "chain_gradient"),
    }


def _calls(steps: Mapping[str, Callable[..., Any]], *arguments: Any) -> dict[str, Callable[[], Any]]:
    return {name: lambda step=step: step(*arguments) for name, step in steps.items()}  # type: ignore[misc]


COMPARISONS = {
    "memory": compare_memory,
    "gradients": compare_gradients,
    "attention": compare_attention,
}


def measure(work: Workload, sizes: Sequence[int], seconds: float) -> dict[str, dict[str, Any]]:
    """Run all comparisons; return {name: {C: result}}, with C as a string for JSON."""
    each = seconds / (len(COMPARISONS) * len(sizes))
    results: dict[str, dict[str, Any]] = {name: {} for name in COMPARISONS}
    for size in sizes:
        for name, compare in COMPARISONS.items():
            print(f"training: {name}, blocks of {size}", file=sys.stderr, flush=True)
            results[name][str(size)] = compare(work, size, each)
    return results


def block_sizes(text: str, work: Workload) -> tuple[int, ...]:
    """Parse block sizes such as "64,128".

    Raises:
      UserError: a size is not a number or not a multiple of 16, or does not divide the rows of `work`.
    """
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--block-sizes: {text!r} is not a list of numbers; write sizes such as 64,128"
        ) from None
    for size in sizes:
        if size < 1 or size % TOKENS_PER_FAM or work.length % size:
            raise UserError(
                f"--block-sizes: {size} does not fit; use multiples of {TOKENS_PER_FAM} that divide the rows of "
                f"{work.length} tokens"
            )
    return sizes


@user_errors()
def main(argv: Sequence[str]) -> None:
    """Measure, print and write the record."""
    parser = ArgumentParser(prog="benchmarks.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--block-sizes", help="values of C, such as 64,128")
    parser.add_argument(
        "--seconds", type=float, help="duration of all measurements, without compilation (default: 300)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of parameters and tokens (default: 0)")
    parser.add_argument("--quick", action="store_true", help="use a tiny model, as a test")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    arguments = parser.parse_args(argv)
    work = dataclasses.replace(QUICK if arguments.quick else FULL, seed=arguments.seed)
    default = QUICK_SIZES if arguments.quick else SIZES
    sizes = block_sizes(arguments.block_sizes, work) if arguments.block_sizes else default
    seconds = arguments.seconds if arguments.seconds is not None else 0.0 if arguments.quick else SECONDS
    results = measure(work, sizes, seconds)
    print_training(results)
    if arguments.json:
        settings = {"workload": work, "block_sizes": sizes, "seconds": seconds, "quick": arguments.quick}
        write_record(arguments.json, "training", argv, settings, results)


if __name__ == "__main__":
    main(sys.argv[1:])
