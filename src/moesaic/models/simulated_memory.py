"""Peak memory of what runs layer by layer, at any size: the real functions on tensors that have shapes and no values.

What is alive is added up, storage by storage: the layer, unpacked by our own code, the next one as it is stored, what
attention, router and experts compute. What stands in for something else:

- values that decide on sizes: every token is real and measured, and experts get equally many tokens;
- attention's chunks of queries: the last one, which sees most, runs; of the others only their outputs are there;
- a GPU: its functions run on tensors of the CPU, with a GPU's sizes of chunks and transformers' grouped experts.

Not counted: CUDA's own memory and what the allocator cannot hand out because of fragmentation.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from moesaic.models import attention, layers, layout, loading, mxfp4
from moesaic.models.architecture import Architecture
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.families.family import ModelShape
from moesaic.models.layers import DecoderLayer, Head, Rotary
from moesaic.models.peak import BATCH, HEAD, LAYERS, Peak
from moesaic.models.synthesis import Model, model_config

_DTYPES = {"U8": torch.uint8, "BF16": torch.bfloat16, "F32": torch.float32}
_NOWHERE = Path("/nowhere")
_attend_rows = attention._attend_rows


_made: ContextVar[str] = ContextVar("what tensors are made for", default=BATCH)


def peak_of(run: Callable[[], object]) -> Peak:
    """The most bytes of tensors that are alive at once while a function runs, of those that it makes."""
    memory = _Alive()
    with memory:
        run()
    return memory.peak


@contextmanager
def made_for(what: str) -> Iterator[None]:
    """Tensors that are made within the block are counted as this."""
    before = _made.set(what)
    try:
        yield
    finally:
        _made.reset(before)


@contextmanager
def without_values(on_gpu: bool) -> Iterator[None]:
    """Within the block tensors have shapes and no values, and layers run as on a GPU or on a CPU."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(attention, "_attend_rows", _attend_last_chunk))
        for table in ("_pair_table", "_power_table"):  # what they keep must have values
            stack.enter_context(patch.object(mxfp4, table, getattr(mxfp4, table).__wrapped__))
        if on_gpu:
            stack.enter_context(patch.object(attention, "_LOGITS", {}))
            stack.enter_context(patch.object(mxfp4, "_PIECE", mxfp4._PIECE_ELSEWHERE))
            stack.enter_context(patch.object(layers, "mixture", layers.grouped_mixture))
        stack.enter_context(torch.no_grad())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_KnownValues())  # type: ignore[no-untyped-call]
        yield


class SimulatedLayers:
    """Layers of a model that is nowhere, loaded as :class:`~moesaic.models.streaming.LayerReader` loads them."""

    def __init__(
        self, shape: ModelShape, architecture: Architecture, packed: bool, precision: str, on_gpu: bool
    ) -> None:
        """Load nothing yet."""
        model = Model(shape, architecture, 1)
        config = layout.child_config(model_config(model), architecture)
        self._checkpoint = Checkpoint(_NOWHERE, config, shape, architecture, packed, {})
        self._dtype, self._on_gpu = getattr(torch, precision), on_gpu
        self._ahead: Mapping[str, Tensor] = {}

    def load(self, layer: int, then: int | None = None) -> DecoderLayer:
        """Build a layer; ``then`` is in memory as it is stored."""
        self._ahead = {}
        with made_for(LAYERS):
            block = loading.build_block(self._checkpoint, layer, self._stored(layer), self._dtype)
            self._ahead = {} if then is None else self._stored(then)
        if self._on_gpu:
            block.self_attn.config._experts_implementation = "grouped_mm"
        return block

    def head(self) -> Head:
        """The final norm and the output head."""
        shape = self._checkpoint.shape
        with made_for(HEAD):
            weight = torch.empty(shape.vocab_size, shape.hidden_size, dtype=self._dtype)
            norm = shape.family.of_transformers("RMSNorm")(shape.hidden_size)
            return Head(norm.requires_grad_(False), weight)

    def rotary(self, num_positions: int) -> Rotary:
        """Cosine and sine of so many positions."""
        with unset_fake_temporarily():
            width = loading.rotary(self._checkpoint, 1)[0].shape[-1]
        cosine = torch.empty(1, num_positions, width, dtype=self._dtype)
        return cosine, torch.empty_like(cosine)

    def states(self, rows: int, tokens: int) -> Tensor:
        """Hidden states of a batch, [batch time hidden]."""
        return torch.empty(rows, tokens, self._checkpoint.shape.hidden_size, dtype=self._dtype)

    def _stored(self, layer: int) -> dict[str, Tensor]:
        checkpoint = self._checkpoint
        block = checkpoint.architecture.blocks[layer]
        specs = layout.layer_specs(checkpoint.shape, layer, block, checkpoint.packed)
        return {name: torch.empty(spec.shape, dtype=_DTYPES[spec.dtype]) for name, spec in specs.items()}


class Elsewhere:
    """A tensor that is kept off the device: only what is read of it takes memory there."""

    def __init__(self, tensor: Tensor) -> None:
        self._shape, self._dtype = tensor.shape, tensor.dtype

    def read(self) -> Tensor:
        """A copy on the device."""
        return torch.empty(self._shape, dtype=self._dtype)

    def drop(self) -> None:
        """There is nothing to free."""


def rows_of_batch(batch_tokens: int, max_tokens: int, max_sequences: int) -> int:
    """Sequences of full length in one batch, as :func:`~moesaic.data.batches.make_batches` batches them."""
    return min(max_sequences, max(1, batch_tokens // max_tokens))


class _Alive(TorchDispatchMode):
    """Adds up the storages that results of operations lie in, for as long as each of them lives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = Peak({})
        self._now: Counter[str] = Counter()
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
                continue
            if (storage := tensor.untyped_storage()) not in self._known:
                self._known[storage] = True
                self._now[_made.get()] += storage.nbytes()
                weakref.finalize(storage, self._free, _made.get(), storage.nbytes())
        if self._now.total() > self.peak.total:
            self.peak = Peak(dict(self._now))
        return results

    def _free(self, what: str, num_bytes: int) -> None:
        self._now[what] -= num_bytes


class _KnownValues(TorchDispatchMode):
    """Answers where a value decides on a size."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, kwargs = torch.ops.aten, kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(one, FakeTensor) for one in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        first = tensors[0] if tensors else torch.empty(0)
        if func is aten._local_scalar_dense.default:
            return {torch.bool: True, torch.int64: 0, torch.uint8: 0}.get(first.dtype, 0.0)
        if func is aten.bincount.default:
            return _shared_out(first.numel(), args[2])
        if func is aten.index.Tensor:
            return func(*_every_row(first, args[1]))
        if func in (aten.index_put_.default, aten._index_put_impl_.default):
            return first
        return func(*args, **kwargs)


def _every_row(tensor: Tensor, indices: list[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
    """The same, with the mask among the indices, if there is one, naming every row."""
    for axis, mask in enumerate(indices):
        if mask is not None and mask.dtype == torch.bool:
            every = tensor.new_empty((mask.numel(),), dtype=torch.int64)
            return tensor.flatten(axis, axis + mask.ndim - 1), [*indices[:axis], every, *indices[axis + 1 :]]
    return tensor, indices


def _shared_out(total: int, num_shares: int) -> Tensor:
    with unset_fake_temporarily():
        shares = torch.full((num_shares,), total // num_shares)
        shares[: total % num_shares] += 1
        return shares


def _attend_last_chunk(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, step: int, *rest: Any) -> Tensor:
    before = query.shape[2] - min(step, query.shape[2])
    outputs = [value.new_empty(*query.shape[:2], before, query.shape[3])]
    outputs.append(_attend_rows(query[:, :, before:], key, value, sinks, step, *rest))
    return torch.cat(outputs, dim=2)
