"""Stages on more nodes than their own pod: a Kubernetes job is started, its log shown, its end waited for.

A cluster profile says which stages get such jobs; placing puts the filled manifest into the task's environment
(``place``, ``manifest``). In the task the runtime hands the stage a :class:`ClusterJob`, and the engine runs through it
the command that it would have run in the pod (``follow``), over the Kubernetes API (``api``, ``status``).
"""

from moesaic.platform.cluster.jobs.follow import ClusterJob
from moesaic.platform.cluster.jobs.place import JOB_VARIABLE, JobPlace

__all__ = ["JOB_VARIABLE", "ClusterJob", "JobPlace"]
