"""Training on several processes: gradients that are added up, or weights that are divided (FSDP2)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from palinode.models.reading import decoder_blocks
from palinode.processes import summed, world

BUCKET = 1 << 25
"""Numbers of gradients that travel together."""


def add_up(parameters: Sequence[torch.nn.Parameter], count: int) -> None:
    """Give each parameter the sum of its gradients in all processes; where none has any, it keeps none."""
    if count < 2:
        return
    own = torch.tensor([float(one.grad is not None) for one in parameters], device=parameters[0].device)
    used = [one for one, yes in zip(parameters, summed(own, most=True).tolist(), strict=True) if yes]
    while used:
        bucket = [used.pop()]
        while used and sum(one.numel() for one in bucket) + used[-1].numel() <= BUCKET:
            bucket.append(used.pop())
        for one in bucket:
            one.grad = torch.zeros_like(one) if one.grad is None else one.grad
        total = summed(torch.cat([one.grad.reshape(-1) for one in bucket if one.grad is not None]))
        for one, part in zip(bucket, total.split([one.numel() for one in bucket]), strict=True):
            one.grad = part.view_as(one)


class _Root(torch.nn.Module):
    """Lets any function of a model run where its shards are put together in time."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[PreTrainedModel], Any]) -> Any:
        """Return what the function makes of the model."""
        return work(self.model)


class Shards:
    """A model whose weights are divided over the processes (FSDP2), and in process 0 the whole it is from."""

    def __init__(self, model: PreTrainedModel) -> None:
        rank, count = world()
        memo: dict[int, Any] = {
            id(one): torch.nn.Parameter(torch.empty_like(one, device="meta"), one.requires_grad)
            for one in model.parameters()
        }
        self.known = {} if rank else dict(model.named_parameters())
        self.model = copy.deepcopy(model, memo)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        mesh = init_device_mesh(self.device.type, (count,))
        for block in decoder_blocks(self.model):
            fully_shard(block, mesh=mesh)
        self.root = _Root(self.model)
        fully_shard(self.root, mesh=mesh)
        apply: Any = self.root._apply
        apply(lambda one: torch.empty_like(one, device=self.device) if one.is_meta else one.to(self.device))
        with torch.no_grad():
            for name, own in self._divided():
                whole = self.known[name] if self.known else torch.empty(own.shape, dtype=own.dtype)
                own.copy_(distribute_tensor(whole.to(self.device), mesh, own.placements))

    def __call__(self, work: Callable[[PreTrainedModel], Any]) -> Any:
        """Return what a function makes of the model, whose weights are put together in time."""
        return self.root(work)

    def reshard(self) -> None:
        """Divide again what a pass without gradients has put together."""
        root: Any = self.root
        root.reshard()

    def _divided(self) -> Iterator[tuple[str, DTensor]]:
        for name, own in self.model.named_parameters():
            assert isinstance(own, DTensor)
            yield name, own

    @torch.no_grad()
    def gather(self) -> None:
        """Give process 0 the weights as they are now, a tensor at a time."""
        for name, own in self._divided():
            whole = own.full_tensor()
            if self.known:
                self.known[name].copy_(whole)
