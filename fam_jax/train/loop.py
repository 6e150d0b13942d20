"""The training loop: resumes where the folder left off, and can be stopped at any step without loss."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from fam_jax import sharding
from fam_jax.checkpoint import Checkpoints, absolute, saved_steps
from fam_jax.config import Config, ConfigError, UserError
from fam_jax.data.build import packed_stream
from fam_jax.data.curriculum import PasskeyStream
from fam_jax.data.mixture import MixedStream
from fam_jax.data.packing import PackedStream
from fam_jax.model import count_parameters
from fam_jax.train.compiler import compiler_options
from fam_jax.train.init_from import check_named, load_base
from fam_jax.train.interruption import Interrupted, stop_requests
from fam_jax.train.metrics import MetricsWriter, ProgressReport
from fam_jax.train.optimizer import make_optimizer
from fam_jax.train.state import TrainState, init_state
from fam_jax.train.step import make_train_step
from fam_jax.train.trace import StepTrace

# (parameters, step) -> figures by name, for the metrics; called every config.evaluate.every steps.
Evaluate = Callable[[Any, int], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What one job compiles and holds."""

    config: Config
    mesh: jax.sharding.Mesh
    state_shapes: TrainState  # ShapeDtypeStructs with shardings
    step: Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]
    create: Callable[[], TrainState]  # the state before the first step, from config.train.init_from if set


def make_trainer(config: Config, devices: Sequence[jax.Device] | None = None) -> Trainer:
    """Mesh over `devices`, by default all, shardings and the jitted step; creates no arrays.

    Raises:
      ConfigError: the mesh does not fit the devices, or does not divide the batch or a parameter.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch(mesh, config.train.batch_size // config.train.accumulation, "train.batch_size")
    optimizer = make_optimizer(config.optimizer, config.train.steps)

    def initial(base: Any) -> TrainState:
        return init_state(config, optimizer, config.train.seed, base)

    shapes = jax.eval_shape(initial, None)
    shardings = sharding.state_shardings(shapes, shapes.params, mesh)
    step = jax.jit(
        sharding.traced_for(mesh, make_train_step(config, optimizer)),
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )
    placed = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings
    )

    def create() -> TrainState:
        base = load_base(config, mesh) if config.train.init_from else None
        return jax.jit(initial, out_shardings=shardings)(base)

    return Trainer(config, mesh, placed, step, create)


def train(
    config: Config,
    workdir: str,
    *,
    evaluate: Evaluate | None = None,
    restore_step: int | None = None,
    profile_steps: tuple[int, int] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains until config.train.steps, from the latest checkpoint of `workdir` if there is one.

    Writes below `workdir`: `config.json`, a folder per checkpoint, `metrics.jsonl`, `tensorboard/`, `profile/`. In a
    job of several processes all call this, and the first one reports.

    Args:
      config: resolved.
      workdir: of the run: a local folder, or one in a bucket (`gs://...`) that all processes reach.
      evaluate: called with the parameters every config.evaluate.every steps; its figures go to the metrics. See
        :func:`fam_jax.evaluate.evaluate_in_training`.
      restore_step: checkpoint to go back to, in place of the latest; later ones are given up.
      profile_steps: first and last step of a profiler trace.
      quiet: no progress on the terminal.

    Returns:
      The last metrics.

    Raises:
      UserError: LoRA has no base, the folder belongs to another config, the loss is not finite, ...
      Interrupted: a signal came; a checkpoint of the last step was saved.
    """
    check_named(config)
    trainer = make_trainer(config)
    stream = _make_stream(config)
    folder, first = absolute(workdir), jax.process_index() == 0
    state = None
    if restore_step is None and not saved_steps(folder):
        state = trainer.create()  # before the folder is made: a base that is not to be had leaves no trace
    with Checkpoints(
        folder, config=dataclasses.asdict(config), keep=config.train.keep_checkpoints
    ) as checkpoints:
        if state is None:
            values, position = checkpoints.restore(restore_step, _as_dict(trainer.state_shapes))
            state = TrainState(**values)
            stream.restore(position)
        remaining = range(int(state.step) + 1, config.train.steps + 1)
        writing: contextlib.AbstractContextManager[MetricsWriter | None] = (
            MetricsWriter(folder, resume_step=int(state.step)) if first else contextlib.nullcontext()
        )
        with (
            writing as writer,
            ProgressReport(config.train.steps, int(state.step), quiet=quiet or not first) as progress,
            StepTrace(folder, profile_steps, remaining=remaining) as trace,
        ):
            run = _Run(trainer, stream, checkpoints, writer, progress, trace, evaluate, folder)
            return run(state, remaining)


Stream = PasskeyStream | PackedStream | MixedStream


def _make_stream(config: Config) -> Stream:
    shard = jax.process_index(), jax.process_count()
    data, size, seed = config.data, config.train.batch_size, config.train.seed

    def passkey() -> PasskeyStream:
        return PasskeyStream(
            data, block_size=config.model.block_size, batch_size=size, seed=seed, shard=shard
        )

    stream: Stream
    if data.task == "passkey":
        stream = passkey()
    elif data.task == "text+passkey":
        stream = MixedStream(
            packed_stream(config, shard),
            passkey(),
            passkey_fraction=data.passkey_fraction,
            last_stage_fraction=data.last_stage_passkey_fraction,
            seed=seed,
        )
    else:
        stream = packed_stream(config, shard)
    name = data.task if data.task.startswith("seqio:") else data.vocabulary
    if config.model.vocab_size < stream.vocabulary.vocab_size:
        raise ConfigError(
            f"config.model.vocab_size: {config.model.vocab_size} is smaller than the vocabulary "
            f"{name!r}, which has {stream.vocabulary.vocab_size} pieces"
        )
    return stream


@dataclasses.dataclass
class _Run:
    trainer: Trainer
    stream: Stream
    checkpoints: Checkpoints
    writer: MetricsWriter | None  # of the first process
    progress: ProgressReport
    trace: StepTrace
    evaluate: Evaluate | None
    folder: epath.Path

    def __call__(self, state: TrainState, remaining: range) -> dict[str, Any]:
        config = self.trainer.config.train
        batch_sharding = sharding.batch_sharding(self.trainer.mesh)
        last: dict[str, Any] = {"parameters": count_parameters(state.params)}
        began, tokens = time.perf_counter(), 0
        with stop_requests() as stop:
            for step in remaining:
                arrays = sharding.global_batch(batch_sharding, self.stream.next_batch())
                with self.trace.step(step):
                    state, metrics = self.trainer.step(state, arrays)
                self.trace.end(step, metrics)
                if self.stream.advancing:
                    self.stream.report(float(metrics["exact_match"]))
                tokens += math.prod(arrays["inputs"].shape)
                self.progress.advance(step)
                signal_number, ending = stop(step), step == config.steps
                saving = bool(signal_number) or ending or step % config.checkpoint_every == 0
                logging = ending or step % config.log_every == 0
                lost = ""
                if saving or logging:
                    jax.block_until_ready(metrics)  # steps are queued, and the clock would run ahead of them
                    lost = self._what_is_lost(step, metrics)
                if logging or lost:
                    last |= self._log(step, metrics, tokens / (time.perf_counter() - began))
                    began, tokens = time.perf_counter(), 0
                if lost:  # before a state that is lost could replace a sound checkpoint
                    raise UserError(lost)
                if saving:
                    self.checkpoints.save(step, _as_dict(state), self.stream.state())
                    if self.writer is not None:
                        self.writer.flush()
                every = self.trainer.config.evaluate.every
                if self.evaluate is not None and every and step % every == 0:
                    self._evaluate(step, state)
                    began, tokens = time.perf_counter(), 0
                if signal_number:
                    self.checkpoints.wait()
                    raise Interrupted(step, signal_number)
        return last

    def _what_is_lost(self, step: int, metrics: dict[str, jax.Array]) -> str:
        """A line about a loss or an update that is not finite; empty if both are."""
        for name in ("loss", "update_norm"):
            value = float(metrics[name])
            if not math.isfinite(value):
                return (
                    f"the {name.replace('_', ' ')} is {value} at step {step}: lower config.optimizer.learning_rate "
                    f"or clip_norm; checkpoints before it are in {self.folder}"
                )
        return ""

    def _log(self, step: int, metrics: dict[str, jax.Array], tokens_per_second: float) -> dict[str, Any]:
        values: dict[str, Any] = {name: float(value) for name, value in metrics.items()}
        values |= {
            "tokens_per_second": tokens_per_second,
            **self.stream.metrics(),
        }
        if self.writer is not None:
            self.writer.write(step, values)
        self.progress.note(
            step,
            f"loss {values['loss']:.3f}  {self.stream.note(values)}  {tokens_per_second:,.0f} tokens/s",
        )
        return values

    def _evaluate(self, step: int, state: TrainState) -> None:
        assert self.evaluate is not None
        figures = self.evaluate(state.params, step)
        if self.writer is not None:
            self.writer.write(step, {"evaluation": figures})


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
