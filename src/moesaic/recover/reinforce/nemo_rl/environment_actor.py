"""The environment as a Ray actor of NeMo-RL, which finds it by this module's name. Not executed here, see the package.

Verifiers limit their time by alarms, so the actor must stay on its process's main thread, as Ray's synchronous actors
do.
"""

from typing import Any

import ray
import torch
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn

from moesaic.recover.reinforce.nemo_rl.graded_replies import Grader


@ray.remote
class VerifiedReplies(EnvironmentInterface):
    """An environment of one turn: a question, a reply, its reward."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._grader = Grader(settings)

    def step(self, message_log_batch: list[list[dict[str, Any]]], metadata: list[dict[str, Any]]) -> EnvironmentReturn:
        """Grade the replies of one step. Every episode ends with its first reply."""
        rewards = self._grader.step(message_log_batch, metadata)
        return EnvironmentReturn(
            observations=[{"role": "environment", "content": ""} for _ in rewards],
            metadata=metadata,
            next_stop_strings=[None] * len(rewards),
            rewards=torch.tensor(rewards),
            terminateds=torch.ones(len(rewards)),
            answers=None,
        )

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
        """No metrics: the training curve has every figure."""
        return batch, {}
