"""Batched generation with a KV cache, for parents and for children whose layers differ.

Requests are sorted by length and go through the model in left-padded batches. Rows that have finished leave the batch
once they are a quarter of it, full-attention caches grow in place instead of being copied at every step, and prompts
are read a few at a time so that attention over them stays small, and once where several requests share one. Requests
may also join a batch that is on its way (:meth:`Decoding.join`), as in a server. Tokens are those of
``model.generate``.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.core.json_text import read_json_object
from moesaic.models.checkpoint import Checkpoint

PREFILL_TOKENS = 4096
"""Padded prompt tokens that go through the model at once."""
COMPACT_BELOW = 0.75
"""Finished rows are dropped when at most this share of the batch is still generating."""
_SPARE_TOKENS = 64
_GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Generated:
    """The reply to one request. ``truncated``: the token limit came before a stop token."""

    token_ids: tuple[int, ...]
    """The generated tokens, the stop token included."""
    truncated: bool

    @property
    def num_tokens(self) -> int:
        """How many tokens were generated."""
        return len(self.token_ids)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when a reply ends."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    temperature: float = 0.0
    """0 takes the most likely token; otherwise tokens are drawn from softmax(logits / temperature)."""
    seed: int = 0
    """Draws depend on it, on the order of the requests and on the batch size."""


def seed_of(*parts: object) -> int:
    """A number below 2^63 that depends on nothing but the parts."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8]) >> 1


def stop_ids(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a reply, as the checkpoint's configuration names them."""
    configs = (model.generation_config, model.config)
    return _first_named((getattr(config, "eos_token_id", None) for config in configs), model.config.name_or_path)


def read_stop_ids(directory: Path) -> frozenset[int]:
    """The tokens that end a reply, read from a checkpoint's files without loading the model."""
    checkpoint = Checkpoint.open(directory)
    named = (read_generation_config(checkpoint).eos_token_id, checkpoint.config["eos_token_id"])
    return _first_named(named, directory)


def read_generation_config(checkpoint: Checkpoint) -> GenerationConfig:
    """How a checkpoint says that replies are made: its ``generation_config.json``, or what its config says of it.

    Raises:
        ArtifactError: if transformers refuses it, or an id is not of the vocabulary.
    """
    path, ids = checkpoint.directory / _GENERATION_CONFIG, ("eos_token_id", "bos_token_id", "pad_token_id")
    given = read_json_object(path) if path.is_file() else {key: checkpoint.config[key] for key in ids}
    for key in ids:
        value = given.get(key)
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if type(token) is not int or not 0 <= token < checkpoint.shape.vocab_size:
                raise ArtifactError(
                    f"{path}: {key} is {token!r}; the vocabulary has ids 0 to {checkpoint.shape.vocab_size - 1}"
                )
    try:
        return GenerationConfig.from_dict(given)
    except Exception as refused:  # transformers checks values by errors of many kinds
        raise ArtifactError(f"{path}: transformers does not take it: {refused}") from refused


def _first_named(candidates: Iterable[int | Sequence[int] | None], model: object) -> frozenset[int]:
    for named in candidates:
        if named is not None and named != []:
            return frozenset([named] if isinstance(named, int) else named)
    raise ConfigError(
        f"neither generation_config.json nor config.json of {model} names an eos_token_id: no reply would end; set it "
        "in generation_config.json"
    )


def generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, batch_size: int
) -> list[Generated]:
    """Generate a reply to every prompt, in the order of the prompts; see :func:`generate_batches`."""
    replies = {
        index: reply for batch in generate_batches(model, prompts, sampling, batch_size) for index, reply in batch
    }
    return [replies[index] for index in range(len(prompts))]


def generate_batches(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, batch_size: int
) -> Iterator[list[tuple[int, Generated]]]:
    """Generate a reply to every prompt; each batch, long prompts first, comes as (index of the prompt, reply) pairs.

    Raises:
        ConfigError: if a prompt is empty, or with its reply longer than the model's positions.
    """
    check_lengths(prompts, sampling.max_new_tokens, model.config.max_position_embeddings)
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        replies = _generate_batch(model, [prompts[index] for index in batch], sampling, generator)
        yield list(zip(batch, replies, strict=True))


def check_lengths(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, positions: int, names: Sequence[str] = ()
) -> None:
    """Refuse prompts that are empty, or with their replies longer than a model's positions.

    Args:
        prompts: token ids.
        max_new_tokens: of a reply.
        positions: of the model.
        names: of the prompts, for the message.

    Raises:
        ConfigError: if one is.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not all(lengths):
        raise ConfigError(f"prompt {lengths.index(0)} has no tokens; a reply needs something to reply to")
    longest = max(lengths, default=0)
    if longest + max_new_tokens > positions:
        which = f"the prompt {names[lengths.index(longest)]!r}" if names else "a prompt"
        raise ConfigError(
            f"{which} of {longest} tokens with a reply of up to {max_new_tokens} does not fit the model's "
            f"{positions} positions; lower max_new_tokens or drop the long prompts"
        )


@torch.inference_mode()
def _generate_batch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator
) -> list[Generated]:
    decoding = read_prompts(model, prompts)
    replies: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    done = [False] * len(prompts)
    for step in range(sampling.max_new_tokens):
        tokens = _choose(decoding.logits, sampling.temperature, generator)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if not done[row]:
                replies[row].append(token)
                done[row] = token in sampling.stop_ids
        live = [place for place, row in enumerate(rows) if not done[row]]
        if not live or step + 1 == sampling.max_new_tokens:
            break
        if len(live) <= COMPACT_BELOW * len(rows):
            decoding.keep(live)
            tokens, rows = tokens[live], [rows[place] for place in live]
        decoding.step(tokens)
    return [Generated(tuple(reply), not finished) for reply, finished in zip(replies, done, strict=True)]


def _choose(
    logits: Float[Tensor, "batch vocab"], temperature: float, generator: torch.Generator
) -> Int[Tensor, " batch"]:
    if temperature == 0:
        return logits.argmax(-1)
    weights = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(weights, 1, generator=generator).squeeze(-1)


def read_prompts(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> "Decoding":
    """A batch that begins with these prompts, of which equal ones are read once."""
    distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    decoding = Decoding(model, list(distinct))
    if len(distinct) < len(prompts):
        decoding.keep([distinct[tuple(prompt)] for prompt in prompts])
    return decoding


class Decoding:
    """A batch of requests on its way: the KV cache, what each row may attend to, and the logits of its next token.

    Creating one reads the prompts (prefill); every :meth:`step` adds one token to every row.
    """

    logits: Float[Tensor, "batch vocab"]

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._length = max(len(prompt) for prompt in prompts)
        ids, self._mask = _pad_left(prompts, self._length, model.device)
        self._positions = self._mask.sum(-1, keepdim=True)
        self.logits, self._cache = _prefill(model, ids, self._mask)

    def step(self, tokens: Int[Tensor, " batch"]) -> None:
        """Append one token to each row and compute the logits of the next."""
        self._length += 1
        if self._length > self._mask.shape[1]:
            self._mask = pad(self._mask, (0, _SPARE_TOKENS), value=1)
        output = self._model(
            input_ids=tokens.unsqueeze(-1),
            attention_mask=self._mask[:, : self._length],
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._positions = self._positions + 1
        self.logits = output.logits[:, -1]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order; one may be named several times.

        Columns that are padding in all of them are dropped, so that a batch is as wide as its longest row.
        """
        chosen = torch.tensor(rows, device=self._mask.device)
        self._mask, self._positions, self.logits = self._mask[chosen], self._positions[chosen], self.logits[chosen]
        self._cache.batch_select_indices(chosen)
        padding = self._length - int(self._positions.max())
        if padding:
            self._length -= padding
            self._mask = self._mask[:, padding:]
            for layer in self._cache.layers:
                _drop_first(layer, padding)

    def join(self, other: "Decoding") -> None:
        """Go on with another batch's rows behind one's own; the shorter batch is padded on the left."""
        longest = max(self._length, other._length)
        masks = [batch._mask[:, : batch._length] for batch in (self, other)]
        self._mask = torch.cat([pad(mask, (longest - mask.shape[1], 0)) for mask in masks])
        self._length = longest
        self._positions = torch.cat([self._positions, other._positions])
        self.logits = torch.cat([self.logits, other.logits])
        pairs = zip(self._cache.layers, other._cache.layers, strict=True)
        self._cache.layers = [_stack(layer, joining, longest) for layer, joining in pairs]


def _pad_left(
    prompts: Sequence[Sequence[int]], length: int, device: torch.device
) -> tuple[Int[Tensor, "batch token"], Int[Tensor, "batch token"]]:
    """Token ids and mask; padding is token 0, which the mask hides."""
    ids = [[0] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _prefill(
    model: PreTrainedModel, ids: Int[Tensor, "batch token"], mask: Int[Tensor, "batch token"]
) -> tuple[Float[Tensor, "batch vocab"], DynamicCache]:
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    rows = max(1, PREFILL_TOKENS // ids.shape[1])
    outputs = [
        model(input_ids=part, attention_mask=part_mask, position_ids=part_positions, use_cache=True, logits_to_keep=1)
        for part, part_mask, part_positions in zip(
            ids.split(rows), mask.split(rows), positions.split(rows), strict=True
        )
    ]
    logits = torch.cat([output.logits[:, -1] for output in outputs])
    return logits, _join([output.past_key_values for output in outputs])


def _join(caches: Sequence[DynamicCache]) -> DynamicCache:
    """One cache of all rows; its full-attention layers get room to grow."""
    joined = caches[0]
    for index, layer in enumerate(joined.layers):
        layer.keys = torch.cat([cache.layers[index].keys for cache in caches])
        layer.values = torch.cat([cache.layers[index].values for cache in caches])
    joined.layers = [layer if layer.is_sliding else GrowingLayer(layer.keys, layer.values) for layer in joined.layers]
    return joined


def _drop_first(layer: DynamicLayer, columns: int) -> None:
    """Forget the first columns, which are padding in every row."""
    if isinstance(layer, GrowingLayer):
        layer.drop_first(columns)
        return
    layer.cumulative_length -= columns
    layer.keys, layer.values = (states[:, :, -layer.cumulative_length :] for states in (layer.keys, layer.values))


def _stack(layer: DynamicLayer, joining: DynamicLayer, length: int) -> DynamicLayer:
    """One layer of the rows of both, which hold ``length`` tokens and padding from then on."""
    keys, values = (_stack_aligned(getattr(layer, name), getattr(joining, name)) for name in ("keys", "values"))
    if isinstance(layer, GrowingLayer):
        return GrowingLayer(keys, values)
    layer.keys, layer.values, layer.cumulative_length = keys, values, length
    return layer


def _stack_aligned(first: Tensor, second: Tensor) -> Tensor:
    """Rows of both, [batch, head, token, dim], aligned at their last token; padding is zero, as 0 x NaN is NaN."""
    width = max(first.shape[2], second.shape[2])
    return torch.cat([pad(states, (0, 0, width - states.shape[2], 0)) for states in (first, second)])


class GrowingLayer(DynamicLayer):
    """A full-attention cache layer with spare room, so that a step writes one token instead of copying all of them."""

    def __init__(
        self, keys: Float[Tensor, "batch head token dim"], values: Float[Tensor, "batch head token dim"]
    ) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._show(_with_room(keys), _with_room(values), keys.shape[2])

    def _show(self, key_room: Tensor, value_room: Tensor, length: int) -> None:
        self._key_room, self._value_room = key_room, value_room
        self.keys, self.values = key_room[:, :, :length], value_room[:, :, :length]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append the new states and return all of them."""
        before, length = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if length > self._key_room.shape[2]:
            self._key_room, self._value_room = _with_room(self.keys), _with_room(self.values)
        self._key_room[:, :, before:length] = key_states
        self._value_room[:, :, before:length] = value_states
        self._show(self._key_room, self._value_room, length)
        return self.keys, self.values

    def drop_first(self, columns: int) -> None:
        """Forget the first tokens of every row."""
        length = self.keys.shape[2] - columns
        self._show(self._key_room[:, :, columns:], self._value_room[:, :, columns:], length)

    def batch_select_indices(self, indices: Int[Tensor, " batch"]) -> None:
        """Keep these rows."""
        self._show(self._key_room[indices], self._value_room[indices], self.keys.shape[2])


def _with_room(states: Tensor) -> Tensor:
    batch, heads, length, dim = states.shape
    room = states.new_empty(batch, heads, length + _SPARE_TOKENS, dim)
    room[:, :, :length] = states
    return room
