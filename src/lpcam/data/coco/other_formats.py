"""JSON files of other formats that may be taken for COCO annotations."""

from __future__ import annotations

from typing import Any

_EXPORT = "export it as COCO JSON from the tool, or convert it"
_FORMATS: tuple[tuple[str, set[str], str], ...] = (
    ("annotations", {"segments_info"}, "panoptic annotations; convert them to instances with "
     "panopticapi's panoptic2detection_coco_format.py"),
    ("annotations", {"caption"}, "a file of captions, which name no class; give instances_*.json"),
    ("", {"shapes", "imagePath"}, "a file of LabelMe, of one image; convert the folder with "
     "labelme2coco"),
    ("", {"_via_img_metadata"}, "a project of VIA; export it as COCO from VIA"),
    ("values", {"filename", "regions"}, "annotations of VIA; export them as COCO from VIA"),
    ("", {"assets"}, f"a project of VoTT; {_EXPORT}"),
    ("", {"asset", "regions"}, f"a file of VoTT, of one image; {_EXPORT}"),
    ("", {"item", "annotations"}, f"a file of V7 Darwin, of one image; {_EXPORT}"),
    ("", {"objects", "size"}, f"a file of Supervisely, of one image; {_EXPORT}"),
    ("", {"features", "type"}, f"a GeoJSON file; {_EXPORT}"),
    ("list", {"data"}, "a JSON list of Label Studio tasks, of the kind label_studio"),
    ("list", {"annotation_id"}, "a JSON list of Label Studio tasks, of the kind label_studio"),
    ("list", {"annotations", "image"}, f"a JSON list of CreateML; {_EXPORT}"),
    ("list", {"annotations", "imagefilename"}, f"a JSON list of CreateML; {_EXPORT}"),
    ("list", {"Labeled Data"}, f"a JSON list of Labelbox; {_EXPORT}"),
    ("list", {"labels", "name"}, f"a JSON list of Scalabel (BDD100K); {_EXPORT}"),
)  # fmt: skip
"""Where marks are, the keys that are marks, and what such a file is."""


def other_format(content: Any) -> str | None:
    """What a parsed JSON file is and what to do with it, if it is of another known format."""
    entries: dict[str, Any] = {"": content}
    if isinstance(content, list):
        entries = {"list": next(iter(content), None)}
        if isinstance(entries["list"], tuple):
            return "a JSON list of detections (COCO results); give the file with the annotations"
    elif isinstance(content, dict):
        entries |= {"values": next(iter(content.values()), None)}
        if isinstance(objects := content.get("annotations"), list):
            entries["annotations"] = next(iter(objects), None)
        elif "images" in content:
            return "a list of images without 'annotations' (image_info); give one with annotations"
    for place, keys, what in _FORMATS:
        if isinstance(found := entries.get(place), dict) and keys <= {*found}:
            return what
    return None
