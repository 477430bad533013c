"""Stages on several nodes: a Kubernetes job runs the stage's command while the task follows the job's log.

A cluster profile says which stages get a job. Placement fills the job's template (``job_template``) and puts the result
(``settings``) into an environment variable of the task. In the task the runtime gives the stage a :class:`ClusterJob`.
Through it the engine runs its command as a job (``follow``), over the Kubernetes API (``api``, ``status``).
"""

from moesaic.platform.cluster.jobs.follow import ClusterJob
from moesaic.platform.cluster.jobs.settings import JOB_VARIABLE, JobSettings

__all__ = ["JOB_VARIABLE", "ClusterJob", "JobSettings"]
