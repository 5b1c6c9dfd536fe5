"""The procedural people as training frames."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cap4d_core.demo.family import FamilyViews, render_fit, sample_fit
from cap4d_core.demo.rendering import SubjectRenderer
from cap4d_core.demo.subject import Subject
from cap4d_core.diffusion.conditioning import RendererTables
from cap4d_core.diffusion.model_config import MMDMConfig
from cap4d_core.diffusion.training.frame_maps import ViewBatch, frames_of
from cap4d_core.diffusion.training.frame_table import FrameTable
from cap4d_core.files.tracking import Tracking
from cap4d_core.flame.model import HeadModel

# Of the atlas; pictures of 128 pixels show no more.
TEXTURE_SIZE = 256


def view_batch(views: FamilyViews) -> ViewBatch:
    """Parameters of demo pictures."""
    return ViewBatch(
        shape=views.shape.expand(len(views), -1),
        expr=views.expr,
        rot=views.rot,
        tra=views.tra,
        eye_rot=views.eye_rot,
        fx=views.fx,
        fy=views.fy,
        cx=views.cx,
        cy=views.cy,
        extr=views.extr,
        resolution=views.resolution,
        crop_box=views.crop_box,
    )


class DemoFrames:
    """Renders demo subjects into frame tables on a device.

    Args:
        head: the demo head model with the mouth, on the device.
        tables: of the conditioning renderer.
        config: sizes of the model.
        supersample: samples per pixel and axis.
    """

    def __init__(
        self, head: HeadModel, tables: RendererTables, config: MMDMConfig, supersample: int = 2
    ) -> None:
        self.head, self.config, self.supersample = head, config, supersample
        self.device = head.faces.device
        self.tables = tables.to(self.device)

    def random(self, subject: Subject, num_views: int) -> FrameTable:
        """Random views; they depend on the subject's number only."""
        rng = np.random.default_rng([subject.traits.seed, 20])
        return self.of_fit(subject, sample_fit(subject.shape, num_views, rng))[0]

    def of_fit(self, subject: Subject, fit: Tracking) -> tuple[FrameTable, Tensor]:
        """The views of a fit, and their mattes (N, H, W) uint8."""
        renderer = SubjectRenderer(subject, self.device)
        views = render_fit(renderer, fit, size=self.config.image_size, supersample=self.supersample)
        images = views.rgb.permute(0, 3, 1, 2).contiguous()
        starts = torch.tensor([0, len(views)])
        table = frames_of(view_batch(views), images, starts, self.head, self.tables, self.config)
        return table, views.matte
