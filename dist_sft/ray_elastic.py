"""How many workers a run of Ray Train may have that grows and shrinks with the cluster.

Ray's own policy counts what nodes have in all, less what other runs of Ray Train asked for. It does
not see whatever else works on the cluster: it would end working ranks to grow into CPUs that are
taken, and try the same number again for ever.
"""

from __future__ import annotations

import time
from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision

from dist_sft import ray_cluster

LOOK_SECONDS = 1.0


class FreePolicy(ElasticScalingPolicy):  # type: ignore[misc]
    """Count only what is free, or has workers of this run."""

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        free = ray_cluster.free_room(self.scaling_config._resources_per_worker_not_none)
        return min(int(super()._count_possible_workers(reserved_resources)), free)

    def make_decision_for_non_running_worker_group(self) -> Any:
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):  # Ray would ask again at once
            time.sleep(LOOK_SECONDS)
        return decision


class Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray's trainer with that policy, for which it has no setting."""

    def _initialize_and_run_controller(self, **how: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            how["scaling_policy"] = FreePolicy(self.scaling_config)
        return super()._initialize_and_run_controller(**how)
