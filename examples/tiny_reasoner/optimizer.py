"""Muon for matrices and stacks of matrices, AdamW for everything else."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from examples.tiny_reasoner.workers import Workers

# Quintic Newton-Schulz coefficients of the published Muon recipe: steep at zero, bounded to about [0.7, 1.2].
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, iterations: int) -> Tensor:
    """Nearest semi-orthogonal matrix of each [..., row, column], approximately."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class StackedMuon(torch.optim.Optimizer):
    """Muon for parameters [row, column] and [expert, row, column]; torch.optim.Muon takes only the former."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float,
        weight_decay: float,
        iterations: int,
        mixed: bool = False,
        workers: Workers | None = None,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations}
        )
        self.mixed, self.workers = mixed, workers or Workers()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; each process finds the directions of its part of them."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            directions = self._directions(parameters, group)
            for parameter, direction in zip(parameters, directions, strict=True):
                # Matched to AdamW's usual step: an orthogonal matrix has entries of size 1/sqrt(longer side).
                scale = 0.2 * max(parameter.shape[-2:]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"] * scale)

    def _directions(self, parameters: list[nn.Parameter], group: dict[str, float]) -> list[Tensor]:
        by_size = sorted(range(len(parameters)), key=lambda index: parameters[index].numel())
        mine = set(by_size[self.workers.rank :: self.workers.count])
        directions = []
        for index, parameter in enumerate(parameters):
            smoothed = self._smoothed(parameter, group["momentum"])
            if index in mine:
                exact = smoothed.bfloat16() if self.mixed else smoothed
                directions.append(orthogonalize(exact, int(group["iterations"])).to(smoothed.dtype))
            else:
                directions.append(torch.zeros_like(smoothed))
        if self.workers.count == 1:
            return directions
        total = self.workers.sum(torch.cat([direction.flatten() for direction in directions]))
        parts = total.split([direction.numel() for direction in directions])
        return [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]

    def _smoothed(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """The gradient after Nesterov's momentum."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)


def is_matrix(name: str) -> bool:
    """Whether Muon takes it: attention projections and expert matrices."""
    return name.endswith(("_proj.weight", "experts.gate_up_proj", "experts.down_proj"))


def build_optimizers(
    model: nn.Module, muon_lr: float, adam_lr: float, mixed: bool = False, workers: Workers | None = None
) -> tuple[StackedMuon, torch.optim.AdamW]:
    """The pair; base learning rates are kept in each group as `base_lr` for the schedule."""
    named = list(model.named_parameters())
    matrices = [parameter for name, parameter in named if is_matrix(name)]
    others = [parameter for name, parameter in named if not is_matrix(name)]
    muon = StackedMuon(matrices, muon_lr, momentum=0.95, weight_decay=0.02, iterations=5, mixed=mixed, workers=workers)
    adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer, base in ((muon, muon_lr), (adam, adam_lr)):
        for group in optimizer.param_groups:
            group["base_lr"] = base
    return muon, adam
