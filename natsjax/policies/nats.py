"""The learned roles as a policy."""

from typing import ClassVar

import jax

from natsjax.config import Config
from natsjax.model import roles
from natsjax.model.attention import RoleSampling
from natsjax.model.inputs import Inputs
from natsjax.policies.base import check_finite, check_seed, policy


@policy
class Nats:
    """The model's own roles, by the largest logit.

    Attributes:
      role bias: added to the logits of the roles that ``nats.biased_roles`` names; above 0 keeps more KV, below less.

    Raises:
      ValueError: the role bias is not finite.
    """

    method: ClassVar[str] = "nats"
    role_bias: float = 0.0

    def __post_init__(self):
        check_finite("role_bias", self.role_bias)

    @property
    def setting(self) -> dict[str, int | float]:
        """The role bias."""
        return {"role_bias": self.role_bias}

    def choice(self, inputs: Inputs, config: Config) -> RoleSampling:
        """The role bias's bias, float32 ``[3]``."""
        return RoleSampling(bias=roles.role_bias_logits(self.role_bias, config.nats.biased_roles))


@policy
class SampledNats:
    """The model's own roles drawn as in training, with Gumbel noise: what the KV penalty was controlled on, never
    served.

    Attributes:
      seed: of the noise.

    Raises:
      ValueError: the seed is out of range.
    """

    method: ClassVar[str] = "nats_sampled"
    seed: int = 0

    def __post_init__(self):
        check_seed(self.seed)

    @property
    def setting(self) -> dict[str, int | float]:
        """The seed."""
        return {"seed": self.seed}

    def choice(self, inputs: Inputs, config: Config) -> RoleSampling:
        """The noise key; whoever measures several batches folds the batch's number into it."""
        return RoleSampling(noise_key=jax.random.key(self.seed))
