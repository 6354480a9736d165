"""Fused kernels for audio-text training with Support Vector Regularization (SupCLAP)."""

from importlib.metadata import PackageNotFoundError, version

from .attach import attach_radius, detach_radius
from .cached import cached_step
from .diagnostics import ForceDecomposition, force_decomposition
from .dispatch import available_backends, explain
from .loss import SVRLoss, fused_svr_loss
from .memory import memory_estimate
from .negatives import Negatives
from .queue import Queue
from .radius import DynamicRadius, StaticRadius
from .reference import svr_loss_reference
from .stats import SVRStats
from .tuning import tune

try:
    __version__ = version("supclap-kernels")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "DynamicRadius",
    "ForceDecomposition",
    "Negatives",
    "Queue",
    "SVRLoss",
    "SVRStats",
    "StaticRadius",
    "attach_radius",
    "available_backends",
    "cached_step",
    "detach_radius",
    "explain",
    "force_decomposition",
    "fused_svr_loss",
    "memory_estimate",
    "svr_loss_reference",
    "tune",
]
