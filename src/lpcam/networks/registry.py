"""The segmentation networks by name; a new network is one file and one line here."""

from __future__ import annotations

from lpcam.networks.base import SegmentationNetwork
from lpcam.networks.deeplabv2 import DeepLabV2Network
from lpcam.networks.upernet import UperNetNetwork
from lpcam.networks.wideresnet38 import WideResNet38Network

NETWORKS: dict[str, SegmentationNetwork] = {
    "deeplabv2": DeepLabV2Network(),
    "wideresnet38": WideResNet38Network(),
    "upernet": UperNetNetwork(),
}
