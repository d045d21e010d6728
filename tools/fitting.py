"""A classifier of Fashion-MNIST trained, and judged; what the comparisons of training share.

The order of the images comes from the seed alone, without augmentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from fashion import Labelled, standardised
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

JUDGED_BATCH = 500


@dataclass(frozen=True)
class Course:
    """Steps, each of a batch of so many images, in the order that the seed decides.

    The learning rate rises over the ``warmup`` steps, and falls to 0 on a half cosine.
    """

    steps: int
    batch: int
    seed: int
    warmup: int = 0


def fit(model: nn.Module, data: Labelled, optimizer: Optimizer, course: Course) -> int:
    """How many steps were done; a loss that is not finite ends the training."""
    schedule = _schedule(optimizer, course)
    model.train()
    for step, chosen in enumerate(_batches(len(data.labels), course)):
        output = model(standardised(data.images[chosen]))
        loss = F.cross_entropy(output, data.labels[chosen])
        if not loss.isfinite():
            return step
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return course.steps


def _schedule(optimizer: Optimizer, course: Course) -> LRScheduler:
    cosine = CosineAnnealingLR(optimizer, course.steps - course.warmup)
    if not course.warmup:
        return cosine
    rise = LinearLR(optimizer, 1 / course.warmup, total_iters=course.warmup)
    return SequentialLR(optimizer, [rise, cosine], [course.warmup])


def _batches(count: int, course: Course) -> Iterator[torch.Tensor]:
    """Indices of batches: all images in a new order, again and again."""
    generator = torch.Generator().manual_seed(course.seed)
    left = torch.empty(0, dtype=torch.long)
    for _ in range(course.steps):
        while len(left) < course.batch:
            left = torch.cat((left, torch.randperm(count, generator=generator)))
        yield left[: course.batch]
        left = left[course.batch :]


@torch.no_grad()
def accuracy(model: nn.Module, data: Labelled) -> float:
    """The share of the images that it classifies rightly, in eval mode."""
    model.eval()
    pieces = (torch.split(each, JUDGED_BATCH) for each in (data.images, data.labels))
    right = [model(standardised(x)).argmax(1) == y for x, y in zip(*pieces, strict=True)]
    return int(torch.cat(right).sum()) / len(data.labels)
