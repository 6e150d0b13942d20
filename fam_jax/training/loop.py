"""The training loop. It resumes from the run's folder, and can be stopped after any step without loss."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

from fam_jax import sharding
from fam_jax.checkpoint import (
    MAY_CHANGE,
    Checkpoints,
    absolute,
    check_name,
    find_vocabulary,
    saved_steps,
)
from fam_jax.config import Config, UserError
from fam_jax.data.build import longest_row, make_batches
from fam_jax.data.interface import Batch, Batches, BatchSpec
from fam_jax.data.vocabulary import check_vocabulary_size, task_digest
from fam_jax.evaluation import evaluate_in_training
from fam_jax.generation.compiled import state_sharding
from fam_jax.model import count_parameters, from_dict, lora
from fam_jax.model.memory_health import MemoryHealth, health_in_training
from fam_jax.training.compiler import compiler_options
from fam_jax.training.flops import peak_flops, step_flops
from fam_jax.training.going_back import remember_restored, step_to_restore
from fam_jax.training.health import Health
from fam_jax.training.init_from import check_named, load_base
from fam_jax.training.interruption import (
    EvaluationStopped,
    Interrupted,
    leave_if_asked_to_stop,
    stop_requests,
)
from fam_jax.training.metrics import MetricsWriter
from fam_jax.training.optimizer import make_optimizer
from fam_jax.training.progress import ProgressReport
from fam_jax.training.room import check_batch_fits, check_state_fits
from fam_jax.training.start import (
    change_notes,
    check_allowed,
    decide_batches,
    find_fork,
    load_from,
    restore_batches,
)
from fam_jax.training.state import TrainState, init_state, model_structure, what_is_carried
from fam_jax.training.step import BATCH_TYPES, START, make_train_step
from fam_jax.training.trace import StepTrace

# (parameters, step) -> figures by name, for the metrics; called every config.evaluate.every steps.
Evaluate = Callable[[Any, int], dict[str, Any]]

# Folder of the workdir with places in data that is read in order.
BOOKMARKS = "bookmarks"


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The mesh, the compiled step and the initial state of a run."""

    config: Config
    mesh: jax.sharding.Mesh
    # ShapeDtypeStructs with shardings.
    state_shapes: TrainState
    step: Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]
    # Returns the state before the first step, from config.train.init_from if it is set.
    create: Callable[[], TrainState]
    # (parameters, inputs of a batch, what the step passes on) -> see `health_in_training`; None: there is no memory.
    look: Callable[[Any, jax.Array, Any], MemoryHealth] | None


def make_trainer(config: Config, devices: Sequence[jax.Device] | None = None) -> Trainer:
    """Make the mesh over `devices` (by default all), the shardings and the jitted step. No arrays are created.

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
    if config.train.carry != "none":
        of_rows = state_sharding(mesh, config.model, config.train.batch_size)
        shardings = dataclasses.replace(
            shardings, carried=what_is_carried(config.model, config.train, of_rows)
        )
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

    return Trainer(config, mesh, placed, step, create, _make_look(config, mesh))


def _make_look(config: Config, mesh: jax.sharding.Mesh) -> Any:
    """Return `Trainer.look`."""
    if not config.model.memory.has_state:
        return None
    graphdef, abstract = model_structure(config)

    def look(params: Any, inputs: jax.Array, carried: Any) -> Any:
        model = nnx.merge(graphdef, from_dict(abstract, params))
        return health_in_training(model, inputs[:, : config.model.block_size], carried)

    return jax.jit(sharding.traced_for(mesh, look), out_shardings=sharding.replicated(mesh))


def train(
    config: Config,
    workdir: str,
    *,
    evaluate: Evaluate | None = None,
    restore_step: int | None = None,
    profile_steps: tuple[int, int] | None = None,
    allow_change: Sequence[str] = (),
    fork: str = "",
    quiet: bool = False,
) -> dict[str, Any]:
    """Train until config.train.steps, from the latest checkpoint of `workdir` if there is one.

    A folder without a checkpoint takes any config. Later, fields whose effect is "execution" may change. Writes
    `config.json`, a folder per checkpoint, `metrics.jsonl`, `tensorboard/` and `profile/` below `workdir`. In a job of
    several processes, call it in all of them; the first one reports.

    Args:
      config: the experiment.
      workdir: folder of the run: local, or in a bucket (`gs://...`) that all processes can access.
      evaluate: called with parameters and step every config.evaluate.every steps; its figures go to the metrics.
        None: the evaluation task of the run's data, by :func:`fam_jax.evaluation.evaluate_in_training`.
      restore_step: checkpoint to go back to, once, instead of the latest; later ones are deleted.
      profile_steps: first and last step of a profiler trace.
      allow_change: other fields that may change now, such as "optimizer.learning_rate". The run keeps its state, and
        config.json records the change.
      fork: WORKDIR or WORKDIR/STEP of a run from whose state (parameters, optimizer, step, data) a new run starts.
        Fields that do not decide what the parameters mean may differ. If the batches do, the data starts over.
      quiet: show nothing on the terminal.

    Returns:
      The last metrics.

    Raises:
      UserError: for example, the folder belongs to another config, or the loss is not finite.
      Interrupted: a signal asked to stop; a checkpoint of the last step was saved.
    """
    folder, first = absolute(workdir), jax.process_index() == 0
    asked, (restore_step, back) = restore_step, step_to_restore(folder, restore_step)
    config = find_vocabulary(config, folder, restore_step, resuming=True)
    if evaluate is None and config.evaluate.every:
        evaluate = evaluate_in_training(config, workdir, on_progress=leave_if_asked_to_stop)
    opened = _open(config, folder, restore_step, allow_change, fork)
    with opened as (trainer, checkpoints, state, batches, notes):
        done = int(state.step)
        if first:
            remember_restored(folder, restore_step, asked)
        remaining = range(done + 1, config.train.steps + 1)
        writing: contextlib.AbstractContextManager[MetricsWriter | None] = (
            MetricsWriter(folder, resume_step=done) if first else contextlib.nullcontext()
        )
        with (
            writing as writer,
            ProgressReport(config.train.steps, done, quiet=quiet or not first) as progress,
            StepTrace(folder, profile_steps, remaining=remaining) as trace,
        ):
            for line in (*_header(config, trainer, state, batches.longest_row, folder), *back, *notes):
                progress.say(line)
            run = _Run(trainer, batches, checkpoints, writer, progress, trace, evaluate, folder)
            return run(state, remaining)


@contextlib.contextmanager
def _open(
    config: Config, folder: epath.Path, restore_step: int | None, allow_change: Sequence[str], fork: str
) -> Iterator[tuple[Trainer, Checkpoints, TrainState, Batches, list[str]]]:
    """Open the folder of a run, for the arguments of :func:`train`.

    Yields:
      The trainer, the checkpoints, the state and the batches to go on with, and lines about what is different now.
    """
    check_named(config)
    check_name(folder)
    changing = check_allowed(allow_change, config)
    source = find_fork(fork, folder, config, restore_step) if fork else None
    check_batch_fits(
        config, longest_row(config.data, block_size=config.model.block_size), jax.process_count()
    )
    trainer = make_trainer(config)
    check_state_fits(trainer.state_shapes, trainer.mesh.local_devices[0])
    batches, notes = _checked_batches(config, folder), list[str]()
    state = None
    if restore_step is None and source is None and not saved_steps(folder):
        state = trainer.create()  # before the folder is made, so that a missing base leaves no trace
    with Checkpoints(
        folder,
        config=dataclasses.asdict(config),
        keep=config.train.keep_checkpoints,
        may_change=(*MAY_CHANGE, *changing),
        step=restore_step,
        forked_from=source.name if source else "",
        task_vocabulary=task_digest(batches.vocabulary, config.data),
    ) as checkpoints:
        if state is None:
            values, position = load_from(checkpoints, restore_step, source, _as_dict(trainer.state_shapes))
            state, before = TrainState(**values), source.config if source else checkpoints.previous_config
            start_over = source is not None or decide_batches(changing)
            batches, notes = restore_batches(
                batches, position, lambda: _checked_batches(config, folder), start_over
            )
            notes += change_notes(before, config, int(state.step))
            if source:
                checkpoints.save(source.step, _as_dict(state), batches.state(), wait=True)
                notes.insert(0, f"forked from {source.name}")
        yield trainer, checkpoints, state, batches, [*checkpoints.notes, *notes]


def _checked_batches(config: Config, folder: epath.Path) -> Batches:
    spec = BatchSpec(
        block_size=config.model.block_size,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        shard=(jax.process_index(), jax.process_count()),
        vocab_size=config.model.vocab_size,
        gather=gather_rows if jax.process_count() > 1 else None,
        bookmarks=str(folder / BOOKMARKS),
    )
    batches = make_batches(config.data, spec)
    check_vocabulary_size(batches.vocabulary, config.model, config.data)
    return batches


def gather_rows(own: np.ndarray) -> np.ndarray:
    """Return the arrays of all processes, joined along the first axis; all processes have to call this together."""
    return multihost_utils.process_allgather(own, tiled=True)


def _header(
    config: Config, trainer: Trainer, state: TrainState, longest_row: int, folder: epath.Path
) -> list[str]:
    """Return the first lines of a run's terminal output."""
    devices, done = list(trainer.mesh.devices.flat), int(state.step)
    mesh = " ".join(f"{axis}={size}" for axis, size in trainer.mesh.shape.items())
    trained, frozen = (count_parameters(part) for part in lora.divide(state.params, config.lora))
    rows = config.train.batch_size
    carried = sum(leaf.nbytes for leaf in jax.tree.leaves(state.carried))
    of_rows = [
        f"carried from step to step: {carried / rows / 2**20:,.1f} MiB for each row, {carried / 2**30:,.2f} GiB in all"
    ]
    return [
        f"devices: {len(devices)} x {devices[0].device_kind}, mesh {mesh}",
        f"parameters: {trained:,} trained, {frozen:,} frozen",
        f"batch: {rows} rows of up to {longest_row:,} tokens, {rows * longest_row:,} tokens per step",
        *(of_rows if config.train.carry != "none" else []),
        f"resuming {folder} after step {done}" if done else f"starting {folder}",
    ]


@dataclasses.dataclass
class _Clock:
    """Tokens and seconds since the last log line; compilation does not count."""

    began: float = dataclasses.field(default_factory=time.perf_counter)
    tokens: int = 0
    flops: float = 0.0

    def add(self, tokens: int, flops: float, compiling: float) -> None:
        """Count a step, but not the `compiling` seconds that it spent compiling."""
        self.tokens, self.flops, self.began = self.tokens + tokens, self.flops + flops, self.began + compiling

    def rates(self) -> tuple[float, float]:
        """Return tokens/s and FLOP/s."""
        seconds = max(time.perf_counter() - self.began, 1e-9)
        return self.tokens / seconds, self.flops / seconds


@dataclasses.dataclass
class _Run:
    """One call of :func:`train`, after all files are open."""

    trainer: Trainer
    batches: Batches
    checkpoints: Checkpoints
    # None in all processes but the first.
    writer: MetricsWriter | None
    progress: ProgressReport
    trace: StepTrace
    evaluate: Evaluate | None
    folder: epath.Path
    # FLOPs of a step by row length, for the lengths that the step has been compiled for.
    flops: dict[int, float] = dataclasses.field(default_factory=dict)
    # What the alarms of the memory at the last log line were about.
    alarms: set[str] = dataclasses.field(default_factory=set)

    def __call__(self, state: TrainState, remaining: range) -> dict[str, Any]:
        config = self.trainer.config
        batch_sharding = sharding.batch_sharding(self.trainer.mesh)
        last: dict[str, Any] = {"parameters": count_parameters(state.params)}
        with stop_requests() as stop:
            if not self._evaluate_if_cut_short(state):
                raise Interrupted(int(state.step), stop(int(state.step)))
            clock, health = _Clock(), Health(config.train.skip_batches, self.folder)
            for step in remaining:
                arrays = sharding.global_batch(batch_sharding, _for_step(self._next_batch(state), config))
                state, metrics, compiling = self._step(step, state, arrays)
                if self.batches.needs_metrics:
                    self.batches.observe(metrics)  # waits for the device
                rows, tokens = arrays["inputs"].shape
                clock.add(rows * tokens, self.flops[tokens], compiling)
                self.progress.advance(step, compiled=compiling > 0)
                health.add(step, metrics)
                signal_number, ending = stop(step), step == config.train.steps
                saving = bool(signal_number) or ending or step % config.train.checkpoint_every == 0
                saving = saving or self.checkpoints.failed
                logging = ending or step % config.train.log_every == 0
                if saving or logging:
                    # Dispatching a step does not wait for its results; without this the clock would stop early.
                    jax.block_until_ready(metrics)
                    self._say_skipped(health)
                if logging or health.must_end:
                    last |= self._log(step, metrics, *clock.rates(), health, self._memory(state, arrays))
                    clock = _Clock()
                if health.must_end:
                    saved = self.checkpoints.latest_step()
                    raise health.end(step, metrics, arrays, state.params, saved)
                if saving:
                    # The last save is waited for here, where it can be made again if it fails.
                    self._save(step, state, wait=bool(signal_number) or ending)
                if self.evaluate is not None and config.evaluate.every and step % config.evaluate.every == 0:
                    if not self._evaluate(step, state):
                        signal_number = stop(step)
                        self._save(step, state, wait=True)
                    clock = _Clock()
                if signal_number:
                    raise Interrupted(step, signal_number)
        if remaining:
            self.progress.say(f"finished: {config.train.steps} steps, results in {self.folder}")
        else:
            self.progress.say(
                f"nothing to do: {int(state.step)} steps are done and train.steps is {config.train.steps}; "
                "raise it to go on"
            )
        return last

    def _next_batch(self, state: TrainState) -> Batch:
        """Return the next batch. If the data has become unusable, save what was learned from it before."""
        try:
            return self.batches.next()
        except UserError:
            # Other processes may not have met the error, and would not save.
            if jax.process_count() == 1 and int(state.step) > (self.checkpoints.latest_step() or 0):
                self._save(int(state.step), state, wait=True)
            raise

    def _step(
        self, step: int, state: TrainState, arrays: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array], float]:
        """Dispatch a step; return its results, and the seconds of its compilation, 0 if there was none."""
        tokens, began = arrays["inputs"].shape[1], time.perf_counter()
        with self.trace.step(step):
            state, metrics = self.trainer.step(state, arrays)
        self.trace.end(step, metrics)
        if tokens in self.flops:
            return state, metrics, 0.0
        self.flops[tokens] = step_flops(self.trainer.config, state.params, tokens)
        return state, metrics, time.perf_counter() - began

    def _say_skipped(self, health: Health) -> None:
        for skipped in health.check():
            self.progress.say(
                f"step {skipped}: the loss, the gradient or the update was not finite; its batch is skipped"
            )

    def _log(
        self,
        step: int,
        metrics: dict[str, jax.Array],
        tokens_per_second: float,
        flops: float,
        health: Health,
        memory: dict[str, float],
    ) -> dict[str, Any]:
        values = self.batches.name_scores({name: float(value) for name, value in metrics.items()})
        data = self.batches.metrics()
        # Batches skipped in this call, not by this step alone.
        values |= {"tokens_per_second": tokens_per_second, "skipped": health.skipped, **memory, **data}
        warning = health.jump(values["loss"], data)
        if warning:
            self.progress.say(f"ALARM: {warning} at step {step}")
        devices = list(self.trainer.mesh.devices.flat)
        peak = peak_flops(devices[0].device_kind)
        if peak is not None:
            values["mfu"] = flops / peak / len(devices)
        if self.writer is not None:
            self.writer.write(step, values)
        utilization = f"  MFU {values['mfu']:.0%}" if peak is not None else ""
        self.progress.note(
            step,
            f"loss {values['loss']:.3f}  {self.batches.describe(values)}  {tokens_per_second:,.0f} tokens/s"
            f"{utilization}",
        )
        return values

    def _memory(self, state: TrainState, arrays: dict[str, jax.Array]) -> dict[str, float]:
        """Return figures of the memory after a step, and say an alarm that was not said before."""
        look, inputs = self.trainer.look, arrays["inputs"]
        if look is None or inputs.shape[1] < self.trainer.config.model.block_size:
            return {}
        found = jax.device_get(look(state.params, inputs, state.carried))
        alarms = found.alarms(self.trainer.config.model)
        for alarm in alarms:
            if alarm.partition(":")[0] not in self.alarms:
                self.progress.say(f"ALARM: {alarm}, after step {int(state.step)}")
        self.alarms = {alarm.partition(":")[0] for alarm in alarms}
        return found.means()

    def _save(self, step: int, state: TrainState, *, wait: bool = False) -> None:
        self.checkpoints.save(step, _as_dict(state), self.batches.state(), wait=wait)
        if self.writer is not None:
            self.writer.flush()
        self.progress.say(f"checkpoint: step {step} in {self.folder}")

    def _evaluate_if_cut_short(self, state: TrainState) -> bool:
        """Make the evaluation of the step that the run resumes from, if it was due there and a kill prevented it.

        Returns:
          False if the run was asked to stop in the meantime.
        """
        step, every = int(state.step), self.trainer.config.evaluate.every
        if self.evaluate is None or not step or not every or step % every:
            return True
        made = np.asarray(self.writer is not None and self.writer.evaluated)
        if jax.process_count() > 1:
            made = multihost_utils.broadcast_one_to_all(made)
        if made:
            return True
        self.progress.say(f"the evaluation of step {step} is missing; making it now")
        return self._evaluate(step, state)

    def _evaluate(self, step: int, state: TrainState) -> bool:
        """Evaluate; return False if the run was asked to stop in the meantime, and nothing was measured."""
        assert self.evaluate is not None
        try:
            figures = self.evaluate(state.params, step)
        except EvaluationStopped:
            self.progress.say(f"evaluation at step {step}: stopped; the run makes it when it resumes")
            return False
        if self.writer is not None:
            self.writer.write(step, {"evaluation": figures})
        for task, scalars in figures.items():
            shown = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items() if "/" not in name)
            self.progress.say(f"evaluation at step {step}: {task}  {shown}")
        return True


def _for_step(batch: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Return the arrays of a batch that the train step takes."""
    names = [*BATCH_TYPES, *([START] if config.train.carry != "none" else [])]
    return {name: batch[name] for name in names}


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
