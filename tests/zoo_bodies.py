"""Bodies of detectors and segmentation networks up to their last convolutions, as torch modules with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tests.models import torchvision_zoo


class fpn(nn.Module):  # bodies are found by name
    """Three resolutions, upsampled by nearest and by bilinear, added and smoothed."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, 8), (8, 16), (16, 24))])
        self.lateral = nn.ModuleList([nn.Conv2d(c, 12, 1) for c in (8, 16, 24)])
        self.smooth = nn.ModuleList([nn.Conv2d(12, 12, 3, 1, 1) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> Any:
        """Three maps."""
        maps = []
        for stage in self.stages:
            x = torch.relu(stage(x))
            maps.append(x)
        top = self.lateral[2](maps[2])
        up = functional.interpolate(top, scale_factor=2.0, mode="nearest")
        middle = self.lateral[1](maps[1]) + up
        up = functional.interpolate(middle, scale_factor=2.0, mode="bilinear", align_corners=False)
        fine = self.lateral[0](maps[0]) + up
        return tuple(s(m) for s, m in zip(self.smooth, (fine, middle, top), strict=True))


class unet(nn.Module):
    """Down by pools, up by transposed convolutions, joined by concat: four levels of 64 to 1,024 channels."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512, 1024)) -> None:
        super().__init__()

        def twice(ins: int, outs: int) -> nn.Module:
            layers = []
            for a in (ins, outs):
                layers += [nn.Conv2d(a, outs, 3, 1, 1), nn.BatchNorm2d(outs), nn.ReLU()]
            return nn.Sequential(*layers)

        self.down = nn.ModuleList([twice(a, b) for a, b in zip((3, *widths), widths, strict=False)])
        self.wider = nn.ModuleList([nn.ConvTranspose2d(a, a // 2, 2, 2) for a in widths[:0:-1]])
        self.up = nn.ModuleList([twice(a, a // 2) for a in widths[:0:-1]])
        self.last = nn.Conv2d(widths[0], 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Four maps of the input's size."""
        maps = []
        for block in self.down:
            x = block(functional.max_pool2d(x, 2) if maps else x)
            maps.append(x)
        for wider, block, fine in zip(self.wider, self.up, maps[-2::-1], strict=True):
            x = block(torch.cat([fine, wider(x)], 1))
        return self.last(x)


class aspp(nn.Module):
    """DeepLab's head: dilated convolutions beside a pooled branch that is resized back."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, 2, 1)
        self.branches = nn.ModuleList([nn.Conv2d(8, 6, 3, padding=d, dilation=d) for d in (1, 6, 12)])
        self.pooled, self.project = nn.Conv2d(8, 6, 1), nn.Conv2d(24, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Five maps of the input's size."""
        x = torch.relu(self.body(x))
        parts = [torch.relu(branch(x)) for branch in self.branches]
        mean = torch.relu(self.pooled(x.mean((2, 3), keepdim=True)))
        parts.append(functional.interpolate(mean, size=x.shape[2:], mode="bilinear", align_corners=False))
        y = self.project(torch.cat(parts, 1))
        return functional.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=False)


# --- as YOLO's of today ----------------------------------------------------------------------------------------------


class Unit(nn.Module):
    """Convolution, BatchNorm, SiLU."""

    def __init__(self, ins: int, outs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(ins, outs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A map."""
        return functional.silu(self.norm(self.conv(x)))


class Split(nn.Module):
    """Half of the channels through residual blocks, everything on the way concatenated."""

    def __init__(self, ins: int, outs: int, blocks: int, residual: bool) -> None:
        super().__init__()
        half = outs // 2
        self.first, self.last = Unit(ins, outs), Unit(half * (2 + blocks), outs)
        self.blocks = nn.ModuleList([nn.Sequential(Unit(half, half, 3), Unit(half, half, 3)) for _ in range(blocks)])
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A map."""
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            y = block(parts[-1])
            parts.append(parts[-1] + y if self.residual else y)
        return self.last(torch.cat(parts, 1))


class Pyramid(nn.Module):
    """Maxima of 5 x 5, stride 1, of the map, of these, and of those."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = Unit(channels, channels // 2), Unit(2 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A map."""
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(functional.max_pool2d(parts[-1], 5, 1, 2))
        return self.last(torch.cat(parts, 1))


class yolo_like(nn.Module):
    """Backbone, a pyramid up (nearest) and down again, and for each of three resolutions a map of boxes and classes."""

    def __init__(self, classes: int = 80) -> None:
        super().__init__()
        self.stem = nn.Sequential(Unit(3, 16, 3, 2), Unit(16, 32, 3, 2), Split(32, 32, 1, True))
        self.p3 = nn.Sequential(Unit(32, 64, 3, 2), Split(64, 64, 2, True))
        self.p4 = nn.Sequential(Unit(64, 128, 3, 2), Split(128, 128, 2, True))
        self.p5 = nn.Sequential(Unit(128, 256, 3, 2), Split(256, 256, 1, True), Pyramid(256))
        self.up4, self.up3 = Split(384, 128, 1, False), Split(192, 64, 1, False)
        self.down3, self.down4 = Unit(64, 64, 3, 2), Unit(128, 128, 3, 2)
        self.out4, self.out5 = Split(192, 128, 1, False), Split(384, 256, 1, False)
        self.heads = nn.ModuleList([nn.Conv2d(c, 64 + classes, 1) for c in (64, 128, 256)])

    def forward(self, x: torch.Tensor) -> Any:
        """[N, boxes and classes, places of all resolutions]."""
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        m4 = self.up4(torch.cat([functional.interpolate(p5, scale_factor=2.0), p4], 1))
        m3 = self.up3(torch.cat([functional.interpolate(m4, scale_factor=2.0), p3], 1))
        n4 = self.out4(torch.cat([self.down3(m3), m4], 1))
        n5 = self.out5(torch.cat([self.down4(n4), p5], 1))
        maps = [head(m).flatten(2) for head, m in zip(self.heads, (m3, n4, n5), strict=True)]
        boxes, classes = torch.cat(maps, 2).split((64, maps[0].shape[1] - 64), 1)
        return boxes, classes.sigmoid()


# --- torchvision's --------------------------------------------------------------------------------------------------


class ssdlite(nn.Module):
    """SSDLite on MobileNetV3-Large up to the last convolutions: boxes and classes of all anchors."""

    def __init__(self) -> None:
        super().__init__()
        torchvision_zoo()
        from torchvision.models.detection import ssdlite320_mobilenet_v3_large

        whole = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
        self.backbone, self.head = whole.backbone, whole.head

    def forward(self, x: torch.Tensor) -> Any:
        """[N, anchors, 4], [N, anchors, classes]."""
        found = self.head(list(self.backbone(x).values()))
        return found["bbox_regression"], found["cls_logits"]


class fpn_resnet50(nn.Module):
    """The pyramid under torchvision's detectors: five maps of 256 channels."""

    def __init__(self) -> None:
        super().__init__()
        torchvision_zoo()
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

        self.body = resnet_fpn_backbone(backbone_name="resnet50", weights=None)

    def forward(self, x: torch.Tensor) -> Any:
        """From fine to coarse."""
        return tuple(self.body(x).values())


class deeplabv3_resnet50(nn.Module):
    """DeepLabV3: dilated stages, and dilated branches of rates 12, 24 and 36."""

    def __init__(self) -> None:
        super().__init__()
        whole = torchvision_zoo().segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)
        self.whole = whole

    def forward(self, x: torch.Tensor) -> Any:
        """[N, 21, H, W]."""
        return self.whole(x)["out"]
