"""One optimizer step as a pure function, and the state that it carries."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from natsjax.config import Config
from natsjax.model import inputs
from natsjax.model.inputs import Batch
from natsjax.model.parameters import norms_by_part, part_labels
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
from natsjax.train.optimizer import learning_rate, optimizer
from pallas_kernels.nats_attention import LOCAL


class TrainState(NamedTuple):
    """All that a run carries from step to step; what a checkpoint holds.

    Attributes:
      step: int32 scalar, optimizer steps taken.
      parameters: nested dict of float32 arrays.
      optimizer: optax state.
      controller: of the KV penalty.
      spikes: running statistics of the loss.
    """

    step: jax.Array
    parameters: Any
    optimizer: Any
    controller: budget_controller.Controller
    spikes: SpikeDetector


class StepMetrics(NamedTuple):
    """What a step reports, float32, on device; scalars where no shape is given.

    Attributes:
      loss: ``cross_entropy + loss.z_loss * z_loss + kv_penalty * kv_fraction``.
      cross_entropy: nats per predicted token.
      z_loss: mean squared logarithm of the output softmax's denominator, without its weight.
      accuracy: share of predicted tokens whose most likely token is right.
      kv_fraction: live key-query pairs over causal ones, roles sampled as in training.
      kv_penalty: nats per token per unit of KV fraction.
      kv_budget: the KV fraction that a controlled KV penalty aims at in this step.
      gradient_norm: Euclidean, before clipping.
      update_norm: of what was added to the parameters (0 where the update was skipped).
      gradient_norms, update_norms: the same by part (``parts.PARTS``).
      learning_rate: of all but a scorer with a rate of its own.
      temperature: of the straight-through softmax.
      skipped: 1 where the update was left out as a loss spike, else 0.
      skipped_steps: how many were since the beginning.
      role_fractions: ``[l, k, 3]``, shares of tokens.
      live_keys: ``[l, k]``, mean number of keys that a query reads.
      live_key_quantiles: ``[l, q]``, of that number, for ``role_statistics.QUANTILES``, rounded up to one of 64 steps.
      scorer_entropy: ``[l, k]``, mean entropy of the scorer's softmax, without noise, nats.
      unended_locals: ``[l, k]``, share of the LOCAL tokens that no GLOBAL one ends within their document.
      forced_globals: share of tokens that are GLOBAL because they are the first of a document.
    """

    loss: jax.Array
    cross_entropy: jax.Array
    z_loss: jax.Array
    accuracy: jax.Array
    kv_fraction: jax.Array
    kv_penalty: jax.Array
    kv_budget: jax.Array
    gradient_norm: jax.Array
    update_norm: jax.Array
    gradient_norms: dict[str, jax.Array]
    update_norms: dict[str, jax.Array]
    learning_rate: jax.Array
    temperature: jax.Array
    skipped: jax.Array
    skipped_steps: jax.Array
    role_fractions: jax.Array
    live_keys: jax.Array
    live_key_quantiles: jax.Array
    scorer_entropy: jax.Array
    unended_locals: jax.Array
    forced_globals: jax.Array


def schedules_at(config: Config, step: int) -> dict[str, float]:
    """What depends on how long the run is, by name, in the step that follows ``step`` others.

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
    return values


class Trainer:
    """The step of one config on one mesh: ``init``, and ``step`` compiled once.

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
        is_scorer = jax.tree.map(lambda part: part == "scorer", part_labels(self.model.parameters))
        self.optimizer = optimizer(config.optimizer, config.train.num_steps, self.model.decayed, is_scorer)
        self.schedule = learning_rate(config.optimizer, config.train.num_steps)
        self.shardings = self._shardings()
        self.compiled_step = jax.jit(self._step, donate_argnums=0)
        self._executable: jax.stages.Compiled | None = None

    @property
    def structure(self) -> nnx.GraphDef:
        """What ``nnx.merge`` makes a model of, with parameters."""
        return self.model.structure

    def init(self) -> TrainState:
        """The state before the first step, from ``train.seed``; the same on every mesh."""
        return jax.jit(self._init, out_shardings=self.shardings)()

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state; nothing is computed."""

        def sharded(x, sharding):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree.map(sharded, jax.eval_shape(self._init), self.shardings)

    def put_batch(self, rows: dict[str, np.ndarray]) -> Batch:
        """The global batch on the devices, from this process's rows of it (``sharding.batch_rows``)."""
        rows = {name: rows[name] for name in inputs.BATCH_FIELDS}
        return put_batch(self.mesh, rows, self.config.train.batch_size)

    def step(self, state: TrainState, batch: Batch | dict[str, np.ndarray]) -> tuple[TrainState, StepMetrics]:
        """The state after a step, and what it reports.

        Args:
          state: is consumed.
          batch: from ``put_batch``, or numpy arrays that ``put_batch`` is called with here.
        """
        if not all(isinstance(x, jax.Array) for x in batch.values()):
            batch = self.put_batch({name: np.asarray(x) for name, x in batch.items()})
        with jax.set_mesh(self.mesh):
            return (self._executable or self.compiled_step)(state, batch)

    def compile(self) -> None:
        """Compiles the step now, so that processes can wait for each other before they meet in its collectives."""
        self._executable = self.lower().compile()

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a global batch."""
        shape = (self.config.train.batch_size, self.config.data.context_length)
        spec = compute_spec(("batch", "sequence"))
        sharding = named_sharding(self.mesh, spec)
        kinds = {name: jnp.float32 if name == "loss_weight" else jnp.int32 for name in inputs.BATCH_FIELDS}
        return {name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for name, kind in kinds.items()}

    def lower(self) -> jax.stages.Lowered:
        """The step for this mesh, whose devices need not be here, from shapes alone."""
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
        optimizer = optax.tree.map_params(
            self.optimizer,
            lambda _, sharding: sharding,
            abstract.optimizer,
            parameters,
            transform_non_params=lambda _: replicated,
        )
        scalars = jax.tree.map(lambda _: replicated, (abstract.step, abstract.controller, abstract.spikes))
        step, controller, spikes = scalars
        return TrainState(step, parameters, optimizer, controller, spikes)

    def _init(self) -> TrainState:
        key = jax.random.key(self.config.train.seed)
        _, parameters = init_parameters(self.config, self.vocab_size, key)
        controller = budget_controller.start_controller(self.config.nats)
        return TrainState(jnp.int32(0), parameters, self.optimizer.init(parameters), controller, start_detector())

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """``(state, metrics)`` after the global batch, arrays ``[b, t]``; pure, the noise follows from the step."""
        price = budget_controller.kv_penalty(state.controller)
        totals = losses.batch_totals(batch)
        temperature = budget_controller.temperature_at(state.step, self.config.nats, self.config.train.num_steps)
        gradients, loss, sums = self._gradients(state, batch, totals, price, temperature)
        updates, optimizer_state = self.optimizer.update(gradients, state.optimizer, state.parameters)
        kv_fraction = losses.kv_fraction(sums.lifetime, totals)
        controller = state.controller
        if self.config.model.has_roles:
            controller = budget_controller.update_controller(controller, kv_fraction, state.step, self.config.nats)
        cross_entropy = sums.nll / jnp.maximum(totals.loss_weight, 1)
        threshold = self.config.optimizer.spike_threshold
        is_spike, detector = detect(state.spikes, cross_entropy, threshold)
        new = optax.apply_updates(state.parameters, updates), optimizer_state, controller
        if threshold:
            old = state.parameters, state.optimizer, state.controller
            new = jax.tree.map(functools.partial(_kept, is_spike), old, new, is_leaf=_is_schedule)
            updates = jax.tree.map(lambda update: jnp.where(is_spike, 0, update), updates)
        metrics = StepMetrics(
            loss=loss,
            cross_entropy=cross_entropy,
            z_loss=sums.z_loss / jnp.maximum(totals.loss_weight, 1),
            accuracy=sums.correct / jnp.maximum(totals.loss_weight, 1),
            kv_fraction=kv_fraction,
            kv_penalty=price,
            kv_budget=jnp.asarray(budget_controller.budget_at(state.step, self.config.nats), jnp.float32),
            gradient_norm=optax.tree.norm(gradients),
            update_norm=optax.tree.norm(updates),
            gradient_norms=norms_by_part(gradients),
            update_norms=norms_by_part(updates),
            learning_rate=jnp.asarray(self.schedule(state.step), jnp.float32),
            temperature=temperature,
            skipped=is_spike.astype(jnp.float32),
            skipped_steps=detector.skipped.astype(jnp.float32),
            **self._role_metrics(sums, totals),
        )
        return TrainState(state.step + 1, *new, detector), replicate(metrics)

    def _role_metrics(self, sums: LossSums, totals: BatchTotals) -> dict[str, jax.Array]:
        """Those that say what the roles look like."""
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
        self, state, batch: Batch, totals: BatchTotals, price, temperature
    ) -> tuple[Any, jax.Array, LossSums]:
        """Gradients, loss and sums of the whole batch, gone through in microbatches."""
        count = self.config.train.gradient_accumulation_steps
        key = jax.random.fold_in(jax.random.key(self.config.train.seed), state.step)
        gradient = jax.value_and_grad(losses.loss, has_aux=True)

        def microbatch(index, part):
            noise_key = jax.random.fold_in(key, index)
            (loss, sums), gradients = gradient(
                state.parameters, self.model.structure, self.config, part, totals, noise_key, price, temperature
            )
            return gradients, loss, sums

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


def _is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def _kept(is_spike: jax.Array, before: Any, after: Any) -> Any:
    """What a step leaves: the state before it where its update is skipped, but schedules go on with the steps."""
    return after if _is_schedule(before) else jnp.where(is_spike, before, after)
