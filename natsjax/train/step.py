"""One optimizer step as a pure function, and the state that it carries."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from natsjax.config import Config
from natsjax.model.inputs import Batch
from natsjax.model.parameters import norms_by_part
from natsjax.model.roles import noise_at
from natsjax.model.sharding import (
    check,
    compute_sharding,
    compute_spec,
    make_mesh,
    named_sharding,
    put_batch,
    replicate,
    sharding_of,
    storage_spec,
)
from natsjax.model.transformer import init_parameters, model_structure
from natsjax.train import budget_controller, losses, role_statistics
from natsjax.train.loss_spikes import SpikeDetector, detect, start_detector
from natsjax.train.losses import BatchTotals, LossSums
from natsjax.train.optimizer import learning_rate, optimizer, schedule_free_average
from pallas_kernels.nats_attention import LOCAL


class TrainState(NamedTuple):
    """State that a run carries from step to step, and that a checkpoint holds.

    Attributes:
      step: int32 scalar, optimizer steps taken.
      parameters: nested dict of arrays (``model.param_dtype``).
      optimizer: optax state.
      controller: of the KV penalty.
      spikes: running statistics of the loss.
      average: the parameters that are evaluated and served, nested as ``parameters``, under ``optimizer.ema_decay``;
        else None. In a checkpoint that ``Trainer.to_save`` made, also the average of a schedule-free run.
    """

    step: jax.Array
    parameters: Any
    optimizer: Any
    controller: budget_controller.Controller
    spikes: SpikeDetector
    average: Any = None


OPTIMIZER_SCOPE = "optimizer"
"""The ``jax.named_scope`` of the update, by which profiles know its operations."""

StepMetrics = dict[str, jax.Array]
"""Float32 arrays by name that a step returns beside the state; ``natsjax.runs.metrics`` declares and documents each."""


def schedules_at(config: Config, step: int) -> dict[str, float]:
    """Returns the values that depend on the length of the run, by name, in the step after ``step`` others.

    The budget's ramp and the warm-up are given in steps, and the KV penalty is controlled from where it is: they do
    not.
    """
    optimizer, num_steps = config.optimizer, config.train.num_steps
    rate = float(learning_rate(optimizer, num_steps)(step))
    values = {"learning rate": rate}
    if config.model.has_roles:
        if optimizer.scorer_learning_rate:
            values["scorer learning rate"] = rate * optimizer.scorer_learning_rate / optimizer.peak_learning_rate
        values["temperature"] = float(budget_controller.temperature_at(jnp.int32(step), config.nats, num_steps))
        values["scale of the role noise"] = float(noise_at(jnp.int32(step), config.nats, num_steps))
    return values


class Trainer:
    """Optimizer steps of one config on one mesh: ``init``, and ``step`` compiled once.

    Args:
      config: of the run.
      vocab_size: of the data.
      mesh: of ``sharding.make_mesh``; by default the config's, over all devices.

    Attributes:
      model: ``model.ModelStructure``.
      shardings: of the state at rest, ``NamedSharding`` nested as ``TrainState``.

    Raises:
      UserError: the config's sizes cannot be divided along the mesh.
    """

    def __init__(self, config: Config, vocab_size: int, mesh: Mesh | None = None):
        self.config = config
        self.vocab_size = vocab_size
        self.mesh = make_mesh(config.mesh) if mesh is None else mesh
        check(config, vocab_size, self.mesh)
        self.model = model_structure(config, vocab_size)
        self.optimizer = optimizer(config.optimizer, config.train.num_steps, self.model)
        self.schedule = learning_rate(config.optimizer, config.train.num_steps)
        self._derives_average = config.optimizer.name == "schedule_free"
        self._average = jax.jit(schedule_free_average)
        self.shardings = self._shardings()
        self.compiled_step = jax.jit(self._step, donate_argnums=0)
        self._executable: jax.stages.Compiled | None = None

    @property
    def structure(self) -> nnx.GraphDef:
        """The argument of ``nnx.merge`` beside the parameters."""
        return self.model.structure

    def init(self) -> TrainState:
        """Draws the state before the first step from ``train.seed``; the same on every mesh."""
        return jax.jit(self._init, out_shardings=self.shardings)()

    def abstract_state(self) -> TrainState:
        """Returns shapes, dtypes and shardings of the state; nothing is computed."""

        def sharded(x, sharding):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree.map(sharded, jax.eval_shape(self._init), self.shardings)

    def served_parameters(self, state: TrainState) -> Any:
        """Returns the parameters that are evaluated and served: an average where the config asks for one."""
        if self._derives_average:
            with jax.set_mesh(self.mesh):
                return self._average(state.optimizer, state.parameters)
        return state.parameters if state.average is None else state.average

    def to_save(self, state: TrainState) -> TrainState:
        """Returns what a checkpoint holds: the state, with the average that is served also where it is derived."""
        return state._replace(average=self.served_parameters(state)) if self._derives_average else state

    def put_batch(self, rows: dict[str, np.ndarray]) -> Batch:
        """Sends this process's rows (``sharding.batch_rows``) to the devices; returns the global batch."""
        return Batch.from_rows(put_batch(self.mesh, Batch.from_rows(rows)._asdict(), self.config.train.batch_size))

    def step(self, state: TrainState, batch: Batch | dict[str, np.ndarray]) -> tuple[TrainState, StepMetrics]:
        """Takes an optimizer step.

        Args:
          state: is consumed.
          batch: from ``put_batch``, or rows to call ``put_batch`` with.

        Returns:
          ``(state, metrics)``.
        """
        if isinstance(batch, dict):
            batch = self.put_batch(batch)
        with jax.set_mesh(self.mesh):
            return (self._executable or self.compiled_step)(state, batch)

    def compile(self) -> None:
        """Compiles the step now, so that processes can wait for each other before they meet in its collectives."""
        self._executable = self.lower().compile()

    def program(self) -> str:
        """Returns the text of the compiled step."""
        return (self._executable or self.lower().compile()).as_text() or ""

    def abstract_batch(self) -> Batch:
        """Returns shapes, dtypes and shardings of a global batch, ``jax.ShapeDtypeStruct``."""
        shape = (self.config.train.batch_size, self.config.data.context_length)
        spec = compute_spec(("batch", "sequence"))
        sharding = named_sharding(self.mesh, spec)
        kinds = {name: jnp.float32 if name == "loss_weight" else jnp.int32 for name in Batch._fields}
        return Batch.from_rows({k: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for k, kind in kinds.items()})

    def lower(self) -> jax.stages.Lowered:
        """Lowers the step for this mesh, whose devices need not be here, from shapes alone."""
        with jax.set_mesh(self.mesh):
            return self.compiled_step.lower(self.abstract_state(), self.abstract_batch())

    def _shardings(self) -> Any:
        abstract = jax.eval_shape(self._init)
        replicated = named_sharding(self.mesh, storage_spec(()))
        parameters = jax.tree.map(
            lambda _, axes: named_sharding(self.mesh, storage_spec(axes)),
            self.model.parameters,
            self.model.axes,
        )
        optimizer = shardings_like(abstract.optimizer, abstract.parameters, parameters, replicated)
        scalars = jax.tree.map(lambda _: replicated, (abstract.step, abstract.controller, abstract.spikes))
        step, controller, spikes = scalars
        average = None if abstract.average is None else parameters
        return TrainState(step, parameters, optimizer, controller, spikes, average)

    def _init(self) -> TrainState:
        key = jax.random.key(self.config.train.seed)
        _, parameters = init_parameters(self.config, self.vocab_size, key)
        controller = budget_controller.start_controller(self.config.nats)
        wide = _wide(parameters)
        state, average = self.optimizer.init(wide), wide if self.config.optimizer.ema_decay else None
        return TrainState(jnp.int32(0), parameters, state, controller, start_detector(), average)

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """Returns ``(state, metrics)`` after a global batch; pure, the noise follows from the step."""
        kv_penalty = budget_controller.kv_penalty(state.controller)
        totals = losses.batch_totals(batch)
        temperature = budget_controller.temperature_at(state.step, self.config.nats, self.config.train.num_steps)
        noise = noise_at(state.step, self.config.nats, self.config.train.num_steps)
        gradients, loss, sums = self._gradients(state, batch, totals, kv_penalty, temperature, noise)
        with jax.named_scope(OPTIMIZER_SCOPE):
            updates, optimizer_state = self.optimizer.update(gradients, state.optimizer, _wide(state.parameters))
            parameters = optax.apply_updates(state.parameters, updates)
        kv_fraction = losses.kv_fraction(sums.lifetime, totals)
        controller = state.controller
        if self.config.model.has_roles:
            num_steps = self.config.train.num_steps
            controller = budget_controller.update_controller(
                controller, kv_fraction, state.step, self.config.nats, num_steps
            )
        cross_entropy = sums.nll / jnp.maximum(totals.loss_weight, 1)
        threshold = self.config.optimizer.spike_threshold
        is_spike, detector = detect(state.spikes, cross_entropy, threshold)
        new = parameters, optimizer_state, controller
        if threshold:
            left = state.controller
            if self.config.model.has_roles:
                left = budget_controller.update_after_skip(left, state.step, self.config.nats)
            old = state.parameters, state.optimizer, left
            new = jax.tree.map(functools.partial(_kept, is_spike), old, new, is_leaf=_is_schedule)
            updates = jax.tree.map(lambda update: jnp.where(is_spike, 0, update), updates)
        average = state.average
        if average is not None:
            average = running_average(average, new[0], state.step, self.config.optimizer.ema_decay)
        metrics = {
            "loss": loss,
            "cross_entropy": cross_entropy,
            "z_loss": sums.z_loss / jnp.maximum(totals.loss_weight, 1),
            "accuracy": sums.correct / jnp.maximum(totals.loss_weight, 1),
            "kv_fraction": kv_fraction,
            "kv_penalty": kv_penalty,
            "kv_budget": jnp.asarray(budget_controller.budget_at(state.step, self.config.nats), jnp.float32),
            "gradient_norm": optax.tree.norm(gradients),
            "update_norm": optax.tree.norm(updates),
            "learning_rate": jnp.asarray(self.schedule(state.step), jnp.float32),
            "temperature": temperature,
            "noise": noise,
            "skipped": is_spike.astype(jnp.float32),
            "skipped_steps": detector.skipped.astype(jnp.float32),
            **{f"gradient_norm/{part}": norm for part, norm in norms_by_part(gradients, self.model.parts).items()},
            **{f"update_norm/{part}": norm for part, norm in norms_by_part(updates, self.model.parts).items()},
            **self._role_metrics(sums, totals),
        }
        return TrainState(state.step + 1, *new, detector, average), replicate(metrics)

    def _role_metrics(self, sums: LossSums, totals: BatchTotals) -> dict[str, jax.Array]:
        """Computes the metrics of the roles."""
        model, length = self.config.model, self.config.data.context_length
        num_queries = totals.tokens * model.num_kv_heads
        return {
            "role_fractions": sums.roles.counts / totals.tokens,
            "live_keys": sums.lifetime / totals.tokens,
            "live_key_quantiles": role_statistics.live_quantiles(sums.roles.more_live, num_queries, length),
            "scorer_entropy": sums.entropy / totals.tokens,
            "unended_locals": sums.roles.unended / jnp.maximum(sums.roles.counts[..., LOCAL], 1),
            "forced_globals": sums.forced / totals.tokens,
        }

    def _gradients(
        self, state, batch: Batch, totals: BatchTotals, kv_penalty, temperature, noise
    ) -> tuple[Any, jax.Array, LossSums]:
        """Computes gradients, loss and sums of the whole batch, microbatch by microbatch."""
        count = self.config.train.gradient_accumulation_steps
        key = jax.random.fold_in(jax.random.key(self.config.train.seed), state.step)
        gradient = jax.value_and_grad(losses.loss, has_aux=True)

        def microbatch(index, part):
            schedules = jax.random.fold_in(key, index), kv_penalty, temperature, noise
            (loss, sums), gradients = gradient(
                state.parameters, self.model.structure, self.config, part, totals, *schedules
            )
            return _wide(gradients), loss, sums

        if count == 1:
            return microbatch(0, batch)
        # Each device's rows are dealt out to all microbatches, so that none has to move.
        dealt = compute_sharding("batch", None, "sequence")
        parts = jax.tree.map(
            lambda x: jnp.reshape(x, (-1, count, *x.shape[1:]), out_sharding=dealt).swapaxes(0, 1), batch
        )

        def add(total, scanned):
            return jax.tree.map(jnp.add, total, microbatch(*scanned)), None

        shapes = jax.eval_shape(microbatch, 0, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=sharding_of(x)), shapes)
        return jax.lax.scan(add, zeros, (jnp.arange(count), parts))[0]


def shardings_like(tree: Any, parameters: Any, shardings: Any, otherwise: NamedSharding) -> Any:
    """Chooses the shardings of an optimizer's state.

    Args:
      tree: the state, arrays or ``jax.ShapeDtypeStruct``; what belongs to a parameter has its path as the end of its
        own.
      parameters: nested dict, of the same kinds.
      shardings: of the parameters.
      otherwise: sharding of what has no parameter's path and shape (counters, factors of a second moment).
    """
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    known = {path: (x.shape, sharding) for (path, x), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)}

    def choose(path, x):
        ends = (known.get(path[start:]) for start in range(len(path)))
        shape, sharding = next((found for found in ends if found is not None), (None, otherwise))
        return sharding if x.shape == shape else otherwise

    return jax.tree_util.tree_map_with_path(choose, tree)


def running_average(average: Any, parameters: Any, step: jax.Array, decay: float) -> Any:
    """Updates the running average of the parameters after a step.

    The decay grows with the step, ``min(decay, (1 + step) / (10 + step))``, so that the initial values, which are
    random, are soon forgotten (as in TensorFlow's ``ExponentialMovingAverage``).
    """
    rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return optax.incremental_update(parameters, average, rate)


def _wide(tree: Any) -> Any:
    """Casts to float32, in which gradients are added and updates computed, whatever parameters are stored in."""
    return optax.tree.cast(tree, jnp.float32)


def _is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def _kept(is_spike: jax.Array, before: Any, after: Any) -> Any:
    """Keeps the state before the step where its update is skipped; schedules count the step all the same."""
    return after if _is_schedule(before) else jnp.where(is_spike, before, after)
