"""The environment as a Ray actor of NeMo-RL, which finds it by this module's name. Not executed here, see the package.

Limits of time in verifiers are alarms, so the actor must keep to its process's main thread, as Ray's synchronous
actors do.
"""

from typing import Any

import ray
import torch
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn

from moesaic.recover.reinforce.nemo_rl.environment import Judge


@ray.remote
class VerifiedReplies(EnvironmentInterface):
    """One question, one reply, one reward."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._judge = Judge(settings)

    def step(self, message_log_batch: list[list[dict[str, Any]]], metadata: list[dict[str, Any]]) -> EnvironmentReturn:
        """Judge the replies of one step; every episode ends with it."""
        rewards = self._judge.step(message_log_batch, metadata)
        return EnvironmentReturn(
            observations=[{"role": "environment", "content": ""} for _ in rewards],
            metadata=metadata,
            next_stop_strings=[None] * len(rewards),
            rewards=torch.tensor(rewards),
            terminateds=torch.ones(len(rewards)),
            answers=None,
        )

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
        """Nothing: the curve has every figure."""
        return batch, {}
