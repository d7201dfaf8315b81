"""The learned roles as a policy."""

from typing import ClassVar

import jax

from natsjax.config import Config
from natsjax.model import roles
from natsjax.model.attention import RoleChoice
from natsjax.model.inputs import Inputs
from natsjax.policies.base import check_finite, check_seed, policy


@policy
class Nats:
    """The model's own roles, by the largest logit.

    Attributes:
      dial: added to the logits of the roles that ``nats.dial`` names; above 0 keeps more KV, below less.

    Raises:
      ValueError: the dial is not finite.
    """

    method: ClassVar[str] = "nats"
    dial: float = 0.0

    def __post_init__(self):
        check_finite("dial", self.dial)

    @property
    def setting(self) -> dict[str, int | float]:
        """The dial."""
        return {"dial": self.dial}

    def choice(self, inputs: Inputs, config: Config) -> RoleChoice:
        """The dial's bias, float32 ``[3]``."""
        return RoleChoice(bias=roles.dial_bias(self.dial, config.nats.dial))


@policy
class SampledNats:
    """The model's own roles drawn as in training, with Gumbel noise: what the price was steered on, never served.

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

    def choice(self, inputs: Inputs, config: Config) -> RoleChoice:
        """The noise key; whoever measures several batches folds the batch's number into it."""
        return RoleChoice(noise_key=jax.random.key(self.seed))
