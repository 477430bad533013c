"""Attention and experts for training gpt-oss on packed rows, fast on one CPU core, through transformers' interfaces.

The model class stays `GptOssForCausalLM`: only the two replaceable functions change. Both compute what the eager
functions compute (a test compares outputs and gradients). Under `torch.autocast` the experts' products run in its type,
attention and the gate in float32.

Sink attention. With logits s_j, sink logit c and L = log(sum_j exp(s_j) + exp(c)), the output is
o = sum_j exp(s_j - L) v_j. The CPU flash kernel gives o_0 and L_0 without the sink, so o = o_0 * exp(L_0 - L). Its
backward only uses o and L, through p_j = exp(s_j - L) and D = <do, o>, and those are right for the sink softmax too, as
the sink's value is zero. The sink's own gradient is -exp(c - L) * D, summed over queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import FunctionCtx
from transformers import AttentionInterface
from transformers.integrations.moe import ExpertsInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "tiny_reasoner_fast"
QUERY_BLOCK = 64
ROW_BLOCK = 64


class SinkAttention(torch.autograd.Function):
    """Softmax attention with one learned sink logit per head, over the CPU flash kernel."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(
        ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """query [batch, head, query, dim], key, value [batch, head, key, dim], sinks [head]; no mask means causal."""
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        plain, plain_lse = flash(query, key, value, 0.0, mask is None, attn_mask=mask, scale=scale)
        sink = sinks.view(1, -1, 1)
        lse = torch.logaddexp(plain_lse, sink)
        output = plain * torch.exp(plain_lse - lse).unsqueeze(-1)
        ctx.save_for_backward(query, key, value, sinks, output, lse)
        ctx.mask, ctx.scale = mask, scale
        return output

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value and sinks, from the kernel fed with the sink's output and normaliser."""
        query, key, value, sinks, output, lse = ctx.saved_tensors
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = flash(grad, query, key, value, output, lse, 0.0, ctx.mask is None, attn_mask=ctx.mask, scale=ctx.scale)
        sink_probability = torch.exp(sinks.view(1, -1, 1) - lse)
        grad_sinks = -(sink_probability * (grad * output).sum(-1)).sum((0, 2))
        return *grads, grad_sinks, None, None


def plain_sink_attention(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """What SinkAttention computes, from its definition: for devices without the CPU kernel."""
    logits = query @ key.mT * scale
    logits = logits + (mask if mask is not None else causal_mask(logits.new_zeros(1, query.shape[2])))
    sink = sinks.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
    probabilities = torch.cat((logits, sink), -1).softmax(-1)[..., :-1]
    return probabilities @ value


def sink_attention(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """The flash kernel on CPU, the definition elsewhere."""
    attend = SinkAttention.apply if query.device.type == "cpu" else plain_sink_attention
    output: Tensor = attend(query, key, value, sinks, mask, scale)
    return output


def window_blocks(keys: Tensor, window: int) -> Tensor:
    """[batch, head, time, dim] -> [batch * block, head, window + QUERY_BLOCK, dim]: what each query block may see."""
    batch, heads, time, dim = keys.shape
    padded = F.pad(keys, (0, 0, window, 0))
    blocks = padded.unfold(2, window + QUERY_BLOCK, QUERY_BLOCK)
    return blocks.permute(0, 2, 1, 4, 3).reshape(batch * (time // QUERY_BLOCK), heads, window + QUERY_BLOCK, dim)


def additive(visible: Tensor) -> Tensor:
    """Zero where visible, minus infinity elsewhere, with an axis for the heads."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, float("-inf")).unsqueeze(1)


def causal_mask(documents: Tensor) -> Tensor:
    """Additive mask [batch, 1, query, key]: earlier positions of the same document; documents [batch, time]."""
    return additive((documents.unsqueeze(2) == documents.unsqueeze(1)).tril())


def window_mask(documents: Tensor, window: int) -> Tensor:
    """Additive mask [batch * block, 1, query, key]: the last `window` positions of the same document."""
    query = torch.arange(QUERY_BLOCK, device=documents.device).view(-1, 1)
    key = torch.arange(window + QUERY_BLOCK, device=documents.device) - window
    seen = F.pad(documents, (window, 0), value=-1).unfold(1, window + QUERY_BLOCK, QUERY_BLOCK).unsqueeze(2)
    same = documents.unfold(1, QUERY_BLOCK, QUERY_BLOCK).unsqueeze(3) == seen
    return additive((same & (key <= query) & (key > query - window)).flatten(0, 1))


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, scale: float, window: int, documents: Tensor
) -> Tensor:
    """Sliding-window sink attention, block by block; time must be a multiple of QUERY_BLOCK."""
    batch, heads, time, dim = query.shape
    num_blocks = time // QUERY_BLOCK
    if num_blocks * QUERY_BLOCK != time:
        raise ValueError(f"sequence length {time} is not a multiple of {QUERY_BLOCK}; pad the rows")
    queries = (
        query.view(batch, heads, num_blocks, QUERY_BLOCK, dim).transpose(1, 2).reshape(-1, heads, QUERY_BLOCK, dim)
    )
    mask = window_mask(documents, window)
    output = sink_attention(queries, window_blocks(key, window), window_blocks(value, window), sinks, mask, scale)
    return output.view(batch, num_blocks, heads, QUERY_BLOCK, dim).transpose(1, 2).reshape(batch, heads, time, dim)


def fast_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    s_aux: Tensor,
    sliding_window: int | None = None,
    documents: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention signature, for right-padded rows without a cache; documents [batch, time] stay apart."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if sliding_window is None:
        mask = None if documents is None else causal_mask(documents)
        output = sink_attention(query, key, value, s_aux, mask, scaling)
    else:
        if documents is None:
            documents = query.new_zeros(query.shape[0], query.shape[2], dtype=torch.long)
        output = window_attention(query, key, value, s_aux, scaling, sliding_window, documents)
    return output.transpose(1, 2).contiguous(), None


class GroupedLinear(torch.autograd.Function):
    """rows sorted by expert times each expert's matrix: x[rows of e] @ weight[e] + bias[e]."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: FunctionCtx, rows: Tensor, weight: Tensor, bias: Tensor, counts: list[int]) -> Tensor:
        """rows [assignment, in], weight [expert, in, out], bias [expert, out]; counts: rows of each expert."""
        output = rows.new_empty(rows.shape[0], weight.shape[2])
        for expert, (source, target) in enumerate(zip(rows.split(counts), output.split(counts), strict=True)):
            torch.addmm(bias[expert], source, weight[expert], out=target)
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        return output

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of rows, weight and bias, expert by expert."""
        rows, weight = ctx.saved_tensors
        grad_rows, grad_weight = torch.empty_like(rows), torch.empty_like(weight)
        grad_bias = weight.new_empty(weight.shape[0], weight.shape[2])
        parts = zip(rows.split(ctx.counts), grad.split(ctx.counts), grad_rows.split(ctx.counts), strict=True)
        for expert, (source, grad_out, grad_in) in enumerate(parts):
            torch.mm(grad_out, weight[expert].T, out=grad_in)
            torch.mm(source.T, grad_out, out=grad_weight[expert])
            torch.sum(grad_out, 0, out=grad_bias[expert])
        return grad_rows, grad_weight, grad_bias, None


class ClampedSwiglu(torch.autograd.Function):
    """gpt-oss' gate on interleaved [assignment, 2 * intermediate]; recomputed in backward to save memory traffic."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: FunctionCtx, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        """(up + 1) * gate * sigmoid(alpha * gate) after clamping, [assignment, intermediate]."""
        ctx.save_for_backward(gate_up)
        ctx.alpha, ctx.limit = alpha, limit
        gate = gate_up[..., ::2].clamp(max=limit)
        up = gate_up[..., 1::2].clamp(-limit, limit)
        return torch.sigmoid(gate * alpha).mul_(gate).mul_(up.add_(1))

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of gate_up; zero where the clamp held."""
        (gate_up,) = ctx.saved_tensors
        raw_gate, raw_up = gate_up[..., ::2], gate_up[..., 1::2]
        gate = raw_gate.clamp(max=ctx.limit)
        sigmoid = torch.sigmoid(gate * ctx.alpha)
        glu = gate * sigmoid
        slope = (1 - sigmoid).mul_(gate).mul_(ctx.alpha).add_(1).mul_(sigmoid)
        grad_gate = slope.mul_(raw_up.clamp(-ctx.limit, ctx.limit).add_(1)).mul_(grad).mul_(raw_gate <= ctx.limit)
        grad_up = glu.mul_(grad).mul_(raw_up.abs() <= ctx.limit)
        return torch.stack((grad_gate, grad_up), -1).flatten(-2), None, None


def fast_experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [token, hidden], top_k_index and top_k_weights [token, k]; tokens sorted by expert first.

    Each expert's rows are filled up to a multiple of ROW_BLOCK with rows that nothing reads: bfloat16's kernels are
    compiled for each number of rows, and few numbers keep them in their cache.
    """
    num_tokens, top_k = top_k_index.shape
    flat = top_k_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=module.num_experts)
    filled = (counts + ROW_BLOCK - 1) // ROW_BLOCK * ROW_BLOCK
    shift = (filled - counts).cumsum(0) - (filled - counts)
    slots = torch.arange(len(order), device=order.device) + shift[flat[order]]
    source = order.new_zeros(int(filled.sum())).scatter_(0, slots, order // top_k)
    rows, sizes = hidden_states.index_select(0, source), filled.tolist()
    gate_up = GroupedLinear.apply(rows, module.gate_up_proj, module.gate_up_proj_bias, sizes)
    gated = ClampedSwiglu.apply(gate_up, module.alpha, module.limit)
    output = GroupedLinear.apply(gated, module.down_proj, module.down_proj_bias, sizes)
    place = torch.empty_like(order).scatter_(0, order, slots)
    chosen = output.index_select(0, place).view(num_tokens, top_k, -1)
    return (chosen * top_k_weights.unsqueeze(-1)).sum(1)


def no_mask(**_: object) -> None:
    """Training rows are causal and right-padded: no mask tensor is ever needed."""


def register() -> None:
    """Make `attn_implementation=NAME` and `experts_implementation=NAME` known to transformers."""
    AttentionInterface.register(NAME, fast_attention)
    AttentionMaskInterface.register(NAME, no_mask)
    ExpertsInterface.register(NAME, fast_experts)
