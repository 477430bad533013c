"""GRPO on NVIDIA NeMo-RL: the engine of ``reinforce`` for clusters.

``config`` renders our config as NeMo-RL's, which NeMo-RL checks when it starts; ``launch`` runs it and brings the
trained tensors back. Inside NeMo-RL's container ``driver`` wires its GRPO to our prompts (``processor``), rewards
(``graded_replies``, in the Ray actor ``environment_actor``) and choice of what learns (``trainable``, in the Ray actor
``policy_worker``). ``surface`` lists every name of NeMo-RL that is used, so that a new version has one place to check.

Its source was read and is tested against (``surface``, ``tests/recover/test_nemo_rl_source.py``): its config classes,
its data loader, our environment in its Ray, our class through the AutoModel that it pins. What was not run needs GPUs
and its container: the training loop, vLLM's generation, the way of the weights from the one to the other. Before a
first run look whether our wheel is in all three of its workers' environments (driver, policy, generation); vLLM's
plugin is put on its workers' path.

What learns is in float32, frozen experts in bfloat16, shared by all GPUs.
"""
