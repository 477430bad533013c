"""Every name of NeMo-RL that we import or hand to it as text, with the file of its source that defines it.

For a new version: read these files again, and the ones that ``tests/unit/nemo_rl_schema.py`` cites.
"""

VERSION = "0.7.0"
"""The release that was read, ``NVIDIA-NeMo/RL`` on GitHub."""

IMAGE = f"nvcr.io/nvidia/nemo-rl:v{VERSION}"
"""The container that has it."""

IMPORTED = {
    "nemo_rl.algorithms.grpo.MasterConfig": "nemo_rl/algorithms/grpo.py",
    "nemo_rl.algorithms.grpo.grpo_train": "nemo_rl/algorithms/grpo.py",
    "nemo_rl.algorithms.grpo.setup": "nemo_rl/algorithms/grpo.py",
    "nemo_rl.algorithms.utils.get_tokenizer": "nemo_rl/algorithms/utils.py",
    "nemo_rl.data.processors.register_processor": "nemo_rl/data/processors.py",
    "nemo_rl.data.utils.setup_response_data": "nemo_rl/data/utils.py",
    "nemo_rl.distributed.ray_actor_environment_registry.ACTOR_ENVIRONMENT_REGISTRY": (
        "nemo_rl/distributed/ray_actor_environment_registry.py"
    ),
    "nemo_rl.distributed.virtual_cluster.PY_EXECUTABLES": "nemo_rl/distributed/virtual_cluster.py",
    "nemo_rl.distributed.virtual_cluster.init_ray": "nemo_rl/distributed/virtual_cluster.py",
    "nemo_rl.environments.interfaces.EnvironmentInterface": "nemo_rl/environments/interfaces.py",
    "nemo_rl.environments.interfaces.EnvironmentReturn": "nemo_rl/environments/interfaces.py",
    "nemo_rl.environments.utils.register_env": "nemo_rl/environments/utils.py",
    "nemo_rl.models.generation.configure_generation_config": "nemo_rl/models/generation/__init__.py",
    "nemo_rl.models.policy.lm_policy.Policy": "nemo_rl/models/policy/lm_policy.py",
    "nemo_rl.models.policy.utils.get_runtime_env_for_policy_worker": "nemo_rl/models/policy/utils.py",
    "nemo_rl.models.policy.workers.dtensor_policy_worker_v2": (
        "nemo_rl/models/policy/workers/dtensor_policy_worker_v2.py"
    ),
}
"""Dotted name: source file."""

CONVERTER = "examples/converters/convert_dcp_to_hf.py"
"""The command that turns its distributed checkpoints into Hugging Face ones, beside the package ``nemo_rl``."""
