"""Speed of training: FAM against none, the library's form against the straightforward one, and what FAM's time goes to.

Every comparison runs its sides in turn, in one process, and gives the median and quartiles of the ratios of rounds:

- memory: a training step with FAM (M = C / 16) against one without, BSWA with m = 1. Beside it stands the ratio that
  the operations alone would give; see `benchmarks.arithmetic`.
- gradients: loss, and loss with gradients, of the library's form, of the scan over whole blocks of `benchmarks.naive`
  and of BSWA; and one layer's FAM chain alone, with its weight gradients deferred or added up block by block. First it
  is checked that both forms give the same loss and gradients.
- attention: block attention and its gradients by XLA against the dense reference.
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
from fam_jax.kernels import block_attention
from launch.cli import ArgumentParser
from launch.errors import user_errors

SIZES = (64, 128, 256, 512, 1024)
QUICK_SIZES = (16,)
SECONDS = 300.0
TOLERANCES = {"loss": 1e-4, "gradient": 1e-3}  # of the difference between two forms, see `_difference`


def compare_memory(work: Workload, size: int, seconds: float) -> dict[str, Any]:
    """Training steps with and without FAM; each side trains a model of its own."""
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
    """Block attention with gradients of queries, keys and values, over random activations."""
    model = with_blocks(work.model, size)
    heads, kv_heads = (model.num_heads, model.head_dim), (model.num_kv_heads, model.head_dim)
    blocks, past = work.length // size, model.memory_segments * size
    keys = jax.random.split(jax.random.key(work.seed), 5)
    shapes = (
        (work.batch, work.length, *heads),
        *[(work.batch, past + work.length, *kv_heads)] * 2,
        *[(work.batch, blocks, model.memory.extra_keys, *kv_heads)] * 2,
    )
    arrays = tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    past_length = jnp.zeros(work.batch, jnp.int32)
    fam_count = jnp.full((work.batch, blocks), model.memory.extra_keys)

    def step(implementation: str) -> Callable[..., Any]:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array, fam_k: jax.Array, fam_v: jax.Array) -> jax.Array:
            out = block_attention(
                q, k, v, fam_k, fam_v, past_length, fam_count,
                block_size=size, memory_segments=model.memory_segments, implementation=implementation,
            )  # fmt: skip
            return jnp.vdot(out, out)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)))

    times = interleave(_calls({name: step(name) for name in ("xla", "reference")}, *arrays), seconds)
    return {"seconds": times.seconds(), "ratio": times.ratio("reference", "xla")}


def compare_gradients(work: Workload, size: int, seconds: float) -> dict[str, Any]:
    """Form against form, with FAM against without, forward against backward; the chain is one layer's.

    Raises:
      AssertionError: the library's form and the naive one differ.
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
    """Of two (loss, gradients): in nats; and the largest of any parameter, against its largest gradient."""

    def relative(a: jax.Array, b: jax.Array) -> float:
        return float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(a).max(), 1e-12))

    return {
        "loss": abs(float(one[0] - other[0])),
        "gradient": max(jax.tree.leaves(jax.tree.map(relative, one[1], other[1]))),
    }


def _shares(times: Times, layers: int) -> dict[str, Any]:
    """Ratios, and seconds per batch; "backward" is the time of loss and gradients less that of the loss alone."""
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
    """All comparisons: {name: {C: result}}, C as a string, since JSON has no other keys."""
    each = seconds / (len(COMPARISONS) * len(sizes))
    results: dict[str, dict[str, Any]] = {name: {} for name in COMPARISONS}
    for size in sizes:
        for name, compare in COMPARISONS.items():
            print(f"training: {name}, blocks of {size}", file=sys.stderr, flush=True)
            results[name][str(size)] = compare(work, size, each)
    return results


def block_sizes(text: str, work: Workload) -> tuple[int, ...]:
    """Parses "64,128".

    Raises:
      UserError: a size is no number, has no whole FAM, or does not divide the rows of `work`.
    """
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--block-sizes: expected numbers such as 64,128, got {text!r}") from None
    for size in sizes:
        if size < 1 or size % TOKENS_PER_FAM or work.length % size:
            raise UserError(
                f"--block-sizes: {size} must be a multiple of {TOKENS_PER_FAM} that divides the rows' "
                f"{work.length} tokens"
            )
    return sizes


@user_errors()
def main(argv: Sequence[str]) -> None:
    """Measures, prints, writes."""
    parser = ArgumentParser(prog="benchmarks.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--block-sizes", help="C, such as 64,128")
    parser.add_argument("--seconds", type=float, help="to measure for, all in all; compilation comes on top")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and tokens")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that all of it runs")
    parser.add_argument("--json", type=Path, help="file to write")
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
