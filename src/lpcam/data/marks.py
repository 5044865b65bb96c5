"""Marks of data sets of other tools: what they are, and how LPCAM can use them."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

_ADVICE = {
    "COCO": "export it as COCO JSON and give that file (kind coco)",
    "TABLE": "save the images as files with a labels.csv (image,labels)",
    "CONVERT": "write a labels.csv (image,labels), or convert it to COCO JSON (kind coco)",
}
# name | patterns of paths, separated by blanks, all found | pattern in a file of the first | advice
_MARKS = r"""
MVTec AD | ^((?:.*/)?)train/good/ ^(?:.*/)?(test|ground_truth)/ | | take its test images: \
lpcam init {}test --labels folders --no-class good
Cityscapes | leftImg8bit gtFine|gtCoarse | | CONVERT
MMSegmentation | (^|/)img_dir/ (^|/)ann_dir/ | | CONVERT
ADE20K | annotations/training/.*\.png$ images/training/ | | CONVERT
CVAT's XML for images | \.xml$ | <annotations> | COCO
Pascal VOC's XML without ImageSets, as labelImg writes it | \.xml$ | <annotation\b | put \
images into JPEGImages, XML into Annotations, image names into ImageSets/Segmentation/train.txt \
and class names into class_names.txt (kind voc)
Supervisely | (^|/)meta\.json$ (^|/)ann/.*\.json$ | | COCO
VoTT | \.vott$|(-asset|-export)\.json$ | | COCO
LabelMe's JSON, one file an image | \.json$ | "shapes"\s*: | convert it to COCO JSON, for example \
with labelme2coco, and give that file (kind coco)
a task of Label Studio alone | \.json$ | "(from_name|completed_by)"\s*: | export the project as \
JSON
results in COCO's form | \.json$ | \A\s*\[\s*\{\s*"(image|category)_id" | give the file that lists \
images and categories (kind coco)
COCO in an unknown form | \.json$ | (?s)\A\s*\{.*"(images|categories)"\s*:\s*\[ | give \
that file, with --kind coco, to see what is wrong
VGG Image Annotator (VIA) | \.(json|csv)$ | region_attributes|_via_settings | COCO
Apple's CreateML | \.json$ | "coordinates"\s*:\s*\{ | COCO
Datumaro | \.json$ | "dm_format_version"|"media_type" | COCO
FiftyOne | (^|/)samples\.json$ | "samples" | COCO
BDD100K | \.json$ | "(poly2d|box2d)" | COCO
SageMaker Ground Truth | \.(manifest|jsonl)$ | "source-ref" | CONVERT
Labelbox | \.ndjson$ | | COCO
DOTA | (^|/)labelTxt | | CONVERT
KITTI | (^|/)label_2/ | | CONVERT
Roboflow's table of labels | ^((?:.*/)?)_classes\.csv$ | | name the table: lpcam init {} --labels \
{}_classes.csv
the metadata of a Hugging Face image folder | ^((?:.*/)?)metadata\.(csv|jsonl)$ | file_name | \
import it: lpcam import huggingface {} FOLDER
Parquet or Arrow | \.(parquet|arrow)$ | | import it: lpcam import huggingface SOURCE FOLDER
a spreadsheet | \.(xlsx?|ods)$ | | TABLE
JSON, not a table of labels | (^|/)labels\.json$ | | write it as labels.jsonl, one object \
with image and labels a line
TFRecord | \.tfrecords?(-\d+-of-\d+)?$|\.record$ | | TABLE
an archive, as those of WebDataset | \.(tar|tgz|tar\.gz|zip|7z|rar)$ | | unpack it
DICOM | \.(dcm|dicom)$|(^|/)DICOMDIR$ | | TABLE
volumes (NIfTI, NRRD) | \.(nii|nii\.gz|nrrd|mha)$ | | TABLE
whole slides | \.(svs|ndpi|mrxs|scn)$ | | TABLE
maps with coordinates | \.(geojson|shp|gpkg|tfw)$ | | TABLE
arrays | \.(npz|npy|h5|hdf5|mat|mdb|pkl|pickle)$|(^|/)data_batch_\d|-ubyte(\.gz)?$ | | TABLE
"""
_OPENED = 5  # files whose contents are looked at for a mark


def other_format(path: Path) -> str:
    """Text that names the format of a folder's or file's marks and what to do; empty if none."""
    root, names = (path, _names(path)) if path.is_dir() else (path.parent, [path.name])
    for line in _MARKS.replace("\\\n", "").strip().splitlines():
        name, paths, contents, advice = (part.strip() for part in re.split(r" \|(?= )", line))
        found = [[m for n in names if (m := re.search(p, n))] for p in paths.split()]
        for match in found[0][:_OPENED] if all(found) else ():
            if not contents or re.search(contents.encode(), _head(root / match.string)):
                folder = f"{root}/{match[1] or ''}" if match.groups() else ""
                advice = _ADVICE.get(advice, advice).replace("{}", folder)
                return f"{match.string} is of {name}; {advice}"
    return ""


def _names(root: Path) -> list[str]:
    """Paths of visible files below a folder."""
    paths = (path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file())
    return [p.as_posix() for p in paths if not any(part.startswith(".") for part in p.parts)]


def _head(path: Path) -> bytes:
    with suppress(OSError), path.open("rb") as file:
        return file.read(1 << 16)
    return b""
