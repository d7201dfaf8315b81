"""One optimizer step as a pure function, and the state that it carries."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natsjax import losses, optim, token_types
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
    """The step of one config: ``init``, and ``step`` compiled once.

    Args:
      config: of the run.
      vocab_size: of the data.
    """

    def __init__(self, config: Config, vocab_size: int):
        self.config = config
        self.vocab_size = vocab_size
        self.structure, self.abstract_parameters, decayed = model_structure(config, vocab_size)
        self.optimizer = optim.optimizer(config.optimizer, config.train.num_steps, decayed)
        self.schedule = optim.learning_rate(config.optimizer, config.train.num_steps)
        self.step = jax.jit(self._step, donate_argnums=0)

    def init(self) -> TrainState:
        """The state before the first step, from ``train.seed``."""
        return jax.jit(self._init)()

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state; nothing is computed."""
        return jax.eval_shape(self._init)

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
        return new_state, metrics

    def _gradients(self, state, batch: Batch, totals: BatchTotals, price) -> tuple[Any, jax.Array, LossSums]:
        """Gradients, loss and sums of the whole batch, gone through in microbatches."""
        count = self.config.train.num_microbatches
        key = jax.random.fold_in(jax.random.key(self.config.train.seed), state.step)
        gradient = jax.value_and_grad(losses.loss, has_aux=True)

        def microbatch(index, part):
            noise_key = jax.random.fold_in(key, index)
            (loss, sums), gradients = gradient(
                state.parameters, self.structure, self.config, part, totals, noise_key, price
            )
            return gradients, loss, sums

        if count == 1:
            return microbatch(0, batch)
        parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)

        def add(total, scanned):
            return jax.tree.map(jnp.add, total, microbatch(*scanned)), None

        shapes = jax.eval_shape(microbatch, 0, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, (jnp.arange(count), parts))[0]
