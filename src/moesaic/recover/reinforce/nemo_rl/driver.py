"""``python -m`` this module with ``config.yaml``: NeMo-RL's GRPO with our data, rewards and frozen tensors.

It runs on the head of the Ray cluster, in NeMo-RL's container. Not executed here, see the package: what it does is
NeMo-RL's own examples/run_grpo.py, with our names registered first.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from moesaic.recover.reinforce.nemo_rl.config import ENVIRONMENT, PROCESSOR

ENVIRONMENT_ACTOR = "moesaic.recover.reinforce.nemo_rl.environment_actor.VerifiedReplies"
POLICY_WORKER = "moesaic.recover.reinforce.nemo_rl.policy_worker.PolicyWorker"


def run(rendered: dict[str, Any]) -> None:
    """Train by a rendered config, from its last checkpoint if there is one."""
    from nemo_rl.algorithms.grpo import MasterConfig, grpo_train, setup
    from nemo_rl.algorithms.utils import get_tokenizer
    from nemo_rl.data.utils import setup_response_data
    from nemo_rl.distributed.virtual_cluster import init_ray
    from nemo_rl.models.generation import configure_generation_config
    from nemo_rl.models.policy.lm_policy import Policy

    # Ours load PyTorch and transformers: where NeMo-RL is missing, that is told first.
    from moesaic.recover.reinforce.nemo_rl.graded_replies import keep_markers

    config = MasterConfig(**rendered)
    register()
    init_ray()
    tokenizer = keep_markers(get_tokenizer(config.policy["tokenizer"]))
    config.policy["generation"] = configure_generation_config(config.policy["generation"], tokenizer)
    dataset, _, environments, _ = setup_response_data(tokenizer, config.data, config.env)
    make_policy = partial(Policy, worker_extension_cls_fqn=POLICY_WORKER)
    policy, generation, _, _, batches, _, loss, logger, checkpoints, state, config, *_ = setup(
        config, tokenizer, dataset, None, policy_factory=make_policy
    )
    grpo_train(policy, generation, batches, None, tokenizer, loss, environments, {}, logger, checkpoints, state, config)


def register() -> None:
    """Make our processor, environment and worker known to NeMo-RL in this process."""
    from nemo_rl.data.processors import register_processor
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
    from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES
    from nemo_rl.environments.utils import register_env

    from moesaic.recover.reinforce.nemo_rl.processor import process

    register_processor(PROCESSOR, process)
    register_env(ENVIRONMENT, ENVIRONMENT_ACTOR)
    ACTOR_ENVIRONMENT_REGISTRY[ENVIRONMENT_ACTOR] = PY_EXECUTABLES.SYSTEM
    ACTOR_ENVIRONMENT_REGISTRY[POLICY_WORKER] = PY_EXECUTABLES.AUTOMODEL


def main(arguments: list[str]) -> None:
    """Read the config and train."""
    (config,) = arguments
    run(yaml.safe_load(Path(config).read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
