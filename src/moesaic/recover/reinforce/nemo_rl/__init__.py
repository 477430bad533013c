"""GRPO on NVIDIA NeMo-RL: the engine of ``reinforce`` for clusters.

``config`` renders our config as NeMo-RL's, which NeMo-RL checks when it starts; ``launch`` runs it and brings the
trained tensors back. Inside NeMo-RL's container ``driver`` wires its GRPO to our prompts (``processor``), rewards
(``graded_replies``, in the Ray actor ``environment_actor``) and choice of what learns (``trainable``, in the Ray actor
``policy_worker``). ``surface`` lists every name of NeMo-RL that is used, so that a new version has one place to check.

What was not run: NeMo-RL needs Ray, vLLM, CUDA and Python 3.13. Everything that imports it (``driver``,
``environment_actor``, ``policy_worker``) was written against the source of its release and has never been executed; the
rest is tested without it. Before a first run these need an answer on the hardware: that NeMo-RL's workers, which hold
transformers below 5.12, load the child's class; that vLLM takes a child's weights from the trainer, experts unpacked;
that our wheel is in all three of NeMo-RL's worker environments (driver, policy, generation). NeMo-RL holds every weight
in float32 while it trains, the frozen ones too: 4 bytes per parameter over all GPUs.
"""
