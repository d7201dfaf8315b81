"""One optimizer step as a pure function, and the state that it carries."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from natsjax import losses, optim, partition, token_types
from natsjax.config import Config
from natsjax.losses import Batch, BatchTotals, LossSums
from natsjax.model import init_parameters, model_structure


class TrainState(NamedTuple):
    """All that a run carries from step to step; what a checkpoint holds.

    Attributes:
      step: int32 scalar, optimizer steps taken.
      parameters: nested dict of float32 arrays.
      optimizer: optax state.
      controller: of the KV price.
    """

    step: jax.Array
    parameters: Any
    optimizer: Any
    controller: token_types.Controller


class StepMetrics(NamedTuple):
    """What a step reports, float32, on device; ``live_keys`` is the mean number of keys a query can read.

    Scalars but for ``role_fractions [l, k, 3]`` and ``live_keys [l, k]``.
    """

    loss: jax.Array
    cross_entropy: jax.Array
    accuracy: jax.Array
    kv_fraction: jax.Array
    kv_price: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array
    role_fractions: jax.Array
    live_keys: jax.Array


class Trainer:
    """The step of one config on one mesh: ``init``, and ``step`` compiled once.

    Args:
      config: of the run.
      vocab_size: of the data.
      mesh: of ``partition.make_mesh``; by default the config's, over all devices.

    Attributes:
      model: ``model.ModelStructure``.
      shardings: of the state at rest, ``NamedSharding`` nested as ``TrainState``.

    Raises:
      UserError: the config's sizes cannot be divided along the mesh.
    """

    def __init__(self, config: Config, vocab_size: int, mesh: Mesh | None = None):
        self.config = config
        self.vocab_size = vocab_size
        self.mesh = partition.make_mesh(config.mesh) if mesh is None else mesh
        partition.check(config, vocab_size, self.mesh)
        self.model = model_structure(config, vocab_size)
        self.optimizer = optim.optimizer(config.optimizer, config.train.num_steps, self.model.decayed)
        self.schedule = optim.learning_rate(config.optimizer, config.train.num_steps)
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
        """The global batch on the devices, from this process's rows of it (``partition.batch_rows``)."""
        rows = {name: rows[name] for name in losses.BATCH_FIELDS}
        return partition.put_batch(self.mesh, rows, self.config.train.batch_size)

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
        spec = partition.compute_spec(("batch", "sequence"))
        sharding = partition.named_sharding(self.mesh, spec)
        kinds = {name: jnp.float32 if name == "loss_weight" else jnp.int32 for name in losses.BATCH_FIELDS}
        return {name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for name, kind in kinds.items()}

    def lower(self) -> jax.stages.Lowered:
        """The step for this mesh, whose devices need not be here, from shapes alone."""
        with jax.set_mesh(self.mesh):
            return self.compiled_step.lower(self.abstract_state(), self.abstract_batch())

    def _shardings(self) -> Any:
        abstract = jax.eval_shape(self._init)
        replicated = partition.named_sharding(self.mesh, partition.storage_spec(()))
        parameters = jax.tree.map(
            lambda _, axes: partition.named_sharding(self.mesh, partition.storage_spec(axes)),
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
        controller = jax.tree.map(lambda _: replicated, abstract.controller)
        return abstract._replace(step=replicated, parameters=parameters, optimizer=optimizer, controller=controller)

    def _init(self) -> TrainState:
        key = jax.random.key(self.config.train.seed)
        _, parameters = init_parameters(self.config, self.vocab_size, key)
        controller = token_types.start_controller(self.config.nats)
        return TrainState(jnp.int32(0), parameters, self.optimizer.init(parameters), controller)

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """``(state, metrics)`` after the global batch, arrays ``[b, t]``; pure, the noise follows from the step."""
        price = token_types.kv_price(state.controller)
        totals = losses.batch_totals(batch)
        gradients, loss, sums = self._gradients(state, batch, totals, price)
        updates, optimizer_state = self.optimizer.update(gradients, state.optimizer, state.parameters)
        kv_fraction = losses.kv_fraction(sums.lifetime, totals)
        metrics = StepMetrics(
            loss=loss,
            cross_entropy=sums.nll / jnp.maximum(totals.loss_weight, 1),
            accuracy=sums.correct / jnp.maximum(totals.loss_weight, 1),
            kv_fraction=kv_fraction,
            kv_price=price,
            gradient_norm=optax.tree.norm(gradients),
            learning_rate=jnp.asarray(self.schedule(state.step), jnp.float32),
            role_fractions=sums.role_counts / totals.tokens,
            live_keys=sums.lifetime / totals.tokens,
        )
        controller = state.controller
        if self.config.model.attention == "nats":
            controller = token_types.steer(controller, kv_fraction, state.step, self.config.nats)
        new_state = TrainState(
            state.step + 1,
            optax.apply_updates(state.parameters, updates),
            optimizer_state,
            controller,
        )
        return new_state, partition.replicate(metrics)

    def _gradients(self, state, batch: Batch, totals: BatchTotals, price) -> tuple[Any, jax.Array, LossSums]:
        """Gradients, loss and sums of the whole batch, gone through in microbatches."""
        count = self.config.train.num_microbatches
        key = jax.random.fold_in(jax.random.key(self.config.train.seed), state.step)
        gradient = jax.value_and_grad(losses.loss, has_aux=True)

        def microbatch(index, part):
            noise_key = jax.random.fold_in(key, index)
            (loss, sums), gradients = gradient(
                state.parameters, self.model.structure, self.config, part, totals, noise_key, price
            )
            return gradients, loss, sums

        if count == 1:
            return microbatch(0, batch)
        # Each device's rows are dealt out to all microbatches, so that none has to move.
        dealt = partition.compute_sharding("batch", None, "sequence")
        parts = jax.tree.map(
            lambda x: jnp.reshape(x, (-1, count, *x.shape[1:]), out_sharding=dealt).swapaxes(0, 1), batch
        )

        def add(total, scanned):
            return jax.tree.map(jnp.add, total, microbatch(*scanned)), None

        shapes = jax.eval_shape(microbatch, 0, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=partition.sharding_of(x)), shapes)
        return jax.lax.scan(add, zeros, (jnp.arange(count), parts))[0]
