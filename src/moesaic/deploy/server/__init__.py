"""An OpenAI-compatible server for parents and children, for one process on a CPU or a GPU.

Requests join and leave one running batch between decode steps (``batching``); replies become text and channels as
their tokens come (``replies``, ``harmony``, ``thinking``); ``protocol`` says what a client may ask for, and ``app``
speaks HTTP. Large deployments are for TensorRT-LLM and vLLM: here one thread drives one model through transformers.
"""
