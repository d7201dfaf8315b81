"""The learned roles as a policy."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from natsjax.config import Config
from natsjax.model import roles
from natsjax.model.attention import RoleSampling
from natsjax.policies.base import LARGEST, DecodingPolicy, StaticPolicy, check_count, check_finite, check_seed, policy


@policy
class Nats(DecodingPolicy):
    """The model's own roles, by the largest logit.

    Attributes:
      role_bias: added to the logits of the roles that ``nats.biased_roles`` names; above 0 keeps more KV, below less.

    Raises:
      ValueError: the role bias is not finite.
    """

    method: ClassVar[str] = "nats"
    needs_roles: ClassVar[bool] = True
    role_bias: float = 0.0

    def __post_init__(self):
        check_finite("role_bias", self.role_bias)

    @property
    def setting(self) -> dict[str, int | float]:
        """The role bias."""
        return {"role_bias": self.role_bias}

    def choice(self, positions: jax.Array, config: Config) -> RoleSampling:
        """Adds the role bias to the logits."""
        return RoleSampling(
            bias=roles.role_bias_logits(
                self.role_bias, config.nats.biased_roles, config.nats.sliding_windows, config.data.context_length
            )
        )

    chunk_choice = choice


@policy
class SampledNats(StaticPolicy):
    """The model's own roles sampled as in the step that was trained last; the KV penalty was controlled on these.

    They are measured with masks and never decoded.

    Attributes:
      seed: of the noise.
      step: optimizer steps that the model has had, for the scale of the noise; by default, all.

    Raises:
      ValueError: a number is out of range.
    """

    method: ClassVar[str] = "nats_sampled"
    needs_roles: ClassVar[bool] = True
    seed: int = 0
    step: int = LARGEST

    def __post_init__(self):
        check_seed(self.seed)
        check_count("step", self.step, 0)

    @property
    def setting(self) -> dict[str, int | float]:
        """The seed."""
        return {"seed": self.seed}

    def choice(self, positions: jax.Array, config: Config) -> RoleSampling:
        """Adds noise; for several batches, fold the batch's number into its key."""
        noise = roles.noise_at(jnp.maximum(self.step - 1, 0), config.nats, config.train.num_steps)
        return RoleSampling(noise_key=jax.random.key(self.seed), noise=noise)
