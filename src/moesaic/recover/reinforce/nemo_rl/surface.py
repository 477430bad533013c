"""Every name of NeMo-RL that we import or hand to it as text, with the file of its source that defines it.

For a new version: change ``COMMIT``, run ``make test-engine``, and read what fails in these files.
"""

VERSION = "0.8.0"
"""The release whose container is used."""

COMMIT = "7ea279abfbeb698b092856d0dab61e7cf39bc909"
"""What was read and is tested against, of ``NVIDIA-NeMo/RL`` on GitHub: its main branch of 2026-08-22, the last before
that release whose source was to be had (the package ``nemo-rl`` of the registry is empty)."""

AUTOMODEL_COMMIT = "24b47e856263d313b942f0ed666c63fff83306b4"
"""The ``NVIDIA-NeMo/Automodel`` that it pins."""

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
