"""The segmentation networks by name; a new network is one file and one line here."""

from __future__ import annotations

from lpcam.runtime.registry import Registry
from lpcam.segmentation.networks.base import SegmentationNetwork

NETWORKS: Registry[SegmentationNetwork] = Registry(
    "segmentation network",
    "lpcam.networks",
    {
        "deeplabv2": "lpcam.segmentation.networks.deeplabv2:NETWORK",
        "wideresnet38": "lpcam.segmentation.networks.wideresnet38:NETWORK",
        "upernet": "lpcam.segmentation.networks.upernet:NETWORK",
    },
)
