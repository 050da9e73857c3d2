"""Any module can be planned and run: a small residual network, whose layers differ in work and in what they hand on.

    plan solve --model examples.cnn:build --cluster cpu:2 --global-batch-size 32 --precision fp32 -o plan.json
    plan run plan.json --model examples.cnn:build --steps 5 -o run.json
    plan compare plan.json run.json

The callable returns the module and one batch of example inputs, whose first dim is the batch. The planner runs it on
fake tensors: nothing is allocated, and no image is needed. The run makes images up; since the module returns no loss, it
takes the mean square of what it returns.
"""

import torch
from torch import nn


class Block(nn.Module):
    """Two convolutions beside a shortcut. A pipeline is never cut inside it."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.relu(self.body(x) + self.shortcut(x))


def resnet(width: int, blocks: tuple[int, ...], image: int, classes: int) -> tuple[nn.Module, tuple[torch.Tensor]]:
    """A residual network: the width doubles and the image halves with every group of blocks."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    channels = width
    for group, count in enumerate(blocks):
        out = width * 2**group
        for index in range(count):
            layers.append(Block(channels, out, 2 if group and index == 0 else 1))
            channels = out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(*layers), (torch.zeros(1, 3, image, image),)


def build() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """For images of 32 x 32, such as CIFAR-10's."""
    return resnet(32, (2, 2, 2), 32, 10)


def large() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """For images of 224 x 224; about 34 million parameters."""
    return resnet(64, (3, 4, 12, 4), 224, 1000)
