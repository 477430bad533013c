"""Batches of token sequences: what the method computes on, wherever the tokens came from."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class TokenSequence:
    """A rendered conversation."""

    token_ids: tuple[int, ...]
    is_response: tuple[bool, ...]


@dataclass(frozen=True)
class Batch:
    """Sequences of similar length, padded on the right."""

    token_ids: Int[Tensor, "batch time"]
    is_token: Bool[Tensor, "batch time"]
    """False where a sequence has ended."""
    is_response: Bool[Tensor, "batch time"]
    """True at tokens the assistant generated."""

    @property
    def num_positions(self) -> int:
        """The length of its longest sequence."""
        return self.token_ids.shape[1]


def make_batches(sequences: list[TokenSequence], batch_tokens: int) -> list[Batch]:
    """Batch by length; at most ``batch_tokens`` positions each, padding included, but at least one sequence."""
    batches: list[list[TokenSequence]] = []
    for sequence in sorted(sequences, key=lambda sequence: len(sequence.token_ids)):
        if batches and (len(batches[-1]) + 1) * len(sequence.token_ids) <= batch_tokens:
            batches[-1].append(sequence)
        else:
            batches.append([sequence])
    return [_pad(batch) for batch in batches]


def _pad(sequences: list[TokenSequence]) -> Batch:
    longest = len(sequences[-1].token_ids)
    token_ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    is_token = torch.zeros(len(sequences), longest, dtype=torch.bool)
    is_response = is_token.clone()
    for row, sequence in enumerate(sequences):
        length = len(sequence.token_ids)
        token_ids[row, :length] = torch.tensor(sequence.token_ids)
        is_token[row, :length] = True
        is_response[row, :length] = torch.tensor(sequence.is_response)
    return Batch(token_ids, is_token, is_response)
