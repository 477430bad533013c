"""NeMo-RL's policy worker, in which only what we name learns. Not executed here, see the package.

Ray finds it by this module's name, in the environment of NeMo-RL's AutoModel workers.
"""

import json
import os
from pathlib import Path
from typing import Any

import ray
from nemo_rl.models.policy.utils import get_runtime_env_for_policy_worker
from nemo_rl.models.policy.workers import dtensor_policy_worker_v2

from moesaic.recover.distill.automodel import cluster_model
from moesaic.recover.reinforce.nemo_rl.config import TRAINABLE_VARIABLE
from moesaic.recover.reinforce.nemo_rl.trainable import PartlyTrainable


@ray.remote(runtime_env=get_runtime_env_for_policy_worker("dtensor_policy_worker_v2"))
class PolicyWorker(dtensor_policy_worker_v2.DTensorPolicyWorkerV2Impl):
    """Loads the child by our AutoModel class and freezes what does not learn before there is an optimiser."""

    def __init__(self, config: dict[str, Any], **options: Any) -> None:
        cluster_model.register()
        names = json.loads(Path(os.environ[TRAINABLE_VARIABLE]).read_text())
        validate = dtensor_policy_worker_v2.validate_and_prepare_config

        def validate_and_wrap(**arguments: Any) -> Any:
            runtime = validate(**arguments)
            return runtime._replace(model_class=PartlyTrainable(runtime.model_class, names))

        # The worker offers no seam between loading and its optimiser; this process is this worker's own.
        dtensor_policy_worker_v2.validate_and_prepare_config = validate_and_wrap
        super().__init__(config, **options)
