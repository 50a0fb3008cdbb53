"""HBM is a cache of fetched experts; the least recently used copy leaves first."""

from dataclasses import dataclass, replace
from typing import Literal

from ndp_gym.plan import Plan, all_far
from ndp_gym.policy import Observation, PolicyContext
from ndp_gym.specs import Service


@dataclass(eq=False)
class Lru:
    """Per-layer LRU on Mixtral: Mixtral-offloading (arXiv 2312.17238).

    Attributes:
        bits: width that is fetched and cached, or the nearest stored one.
        scope: an equal part of HBM for each layer, or one cache over all (which a layer-by-layer
            scan defeats).
    """

    bits: int = 4
    scope: Literal["global", "layer"] = "layer"

    def reset(self, context: PolicyContext) -> None:
        """Make the one plan of the episode; the kernel runs the cache."""
        service = Service(kind="fetch", cache="lru", scope=self.scope)
        self.plan = replace(all_far(context.model, context.system, self.bits), service=service)

    def __call__(self, observation: Observation) -> Plan:
        """The same plan every window."""
        return self.plan
