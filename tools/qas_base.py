"""The net that is fine-tuned: trained in float on the five easy classes of Fashion-MNIST.

It is made once, and kept in a file beside the results together with what it was made from.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import click
import torch
from fashion import Labelled, fashion
from fitting import Course, fit
from small_nets import seeded_net
from torch import nn
from torch.optim import SGD

from fxopt.files import scratch_beside

NET: Final = "mobile"
OLD_CLASSES: Final = (1, 5, 7, 8, 9)
"""Trouser, sandal, sneaker, bag, boot."""
NEW_CLASSES: Final = (0, 2, 3, 4, 6)
"""T-shirt, pullover, dress, coat, shirt: what is learnt in fine-tuning."""
BATCH, LR, MOMENTUM, SEED = 128, 0.1, 0.9, 0
RECIPE: Final = (
    f"{NET} on classes {OLD_CLASSES}, SGD, Nesterov momentum {MOMENTUM}, lr {LR}, batch {BATCH}, "
    f"cosine, seed {SEED}"
)


def of_classes(data: Labelled, classes: tuple[int, ...]) -> Labelled:
    """The images of these classes, whose labels become their places in ``classes``."""
    places = torch.full((max(*classes, int(data.labels.max())) + 1,), -1)
    places[list(classes)] = torch.arange(len(classes))
    labels = places[data.labels]
    return Labelled(data.images[labels >= 0], labels[labels >= 0])


def with_new_head(net: nn.Module, seed: int) -> nn.Sequential:
    """``net``, its last layer exchanged for one of five outputs that is drawn from the seed."""
    assert isinstance(net, nn.Sequential)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        net[-1] = nn.Linear(cast(nn.Linear, net[-1]).in_features, len(NEW_CLASSES))
    return net


@dataclass(frozen=True)
class Base:
    """The net in ``file``, trained for ``steps`` on the images in ``folder``."""

    folder: Path
    file: Path
    steps: int

    def make(self) -> None:
        """Train the net if there is no file; refuse the file of another one."""
        if self.file.exists():
            self.load()
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        net = self._trained().eval()
        with scratch_beside(self.file) as scratch:
            written = scratch / self.file.name
            torch.save({"made_from": self._made_from(), "state": net.state_dict()}, written)
            written.replace(self.file)

    def load(self) -> nn.Sequential:
        """The net as it was trained, in eval mode."""
        net = with_new_head(seeded_net(NET, SEED), SEED)
        kept = torch.load(self.file)
        if kept["made_from"] != self._made_from():
            raise click.UsageError(f"the net in '{self.file}' is another one; move it away")
        net.load_state_dict(kept["state"])
        return net.eval()

    def _trained(self) -> nn.Sequential:
        net = with_new_head(seeded_net(NET, SEED), SEED)
        optimizer = SGD(net.parameters(), LR, MOMENTUM, nesterov=True, foreach=True)
        fit(net, self._images(), optimizer, Course(self.steps, BATCH, SEED))
        return net

    def _made_from(self) -> str:
        """All that decides the weights, but for the code."""
        pixels = zlib.crc32(self._images().images.numpy().tobytes())
        return f"{RECIPE}, {self.steps} steps, images {pixels:08x}"

    def _images(self) -> Labelled:
        return of_classes(fashion(self.folder).training, OLD_CLASSES)
