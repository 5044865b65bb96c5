"""Files of other people: what is doubtful is refused with the way on, the rest read rightly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import COLOURS, draw_folder

from lpcam.cli.main import main
from lpcam.data.dataset import Dataset
from lpcam.data.labels import split_labels
from lpcam.data.masks import read_index_mask, write_mask
from lpcam.pipeline.datasets import read_dataset
from lpcam.pipeline.recipe import load_recipe

Files = Mapping[str, str | bytes | int]
"""Contents by path: text, bytes, or (of a mask) one value; images are grey squares."""
Labels = Mapping[str, Sequence[str]]


def build(root: Path, files: Files | Sequence[str]) -> Path:
    contents = files if isinstance(files, Mapping) else dict.fromkeys(files, "")
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            write_mask(path, np.full((8, 8), content, np.uint8))
        elif content == "" and path.suffix.lower() in (".jpg", ".png", ".jpeg"):
            Image.linear_gradient("L").resize((8, 8)).convert("RGB").save(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


@pytest.fixture
def model(weights: Path) -> list[str]:
    return ["--backbone", "test_resnet", "--weights", str(weights)]


def refused(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    """The message with which init and data check both refuse."""
    messages = []
    for command in (["init"], ["data", "check", "--no-estimate"]):
        assert main([*command, *arguments]) == 2, capsys.readouterr().out
        messages.append(capsys.readouterr().err)
    assert messages[0] == messages[1]
    return messages[0]


def opened(path: Path, arguments: Sequence[str], model: Sequence[str]) -> Dataset:
    """The data set that a run reads after init, which data check reads too."""
    assert main(["init", str(path), *model, *arguments]) == 0
    assert main(["data", "check", str(path), "--no-estimate", *arguments]) in (0, 1)
    folder = path if path.is_dir() else path.parent
    recipe = load_recipe(folder / "recipe.yaml")
    lists = ("classify", "prototypes", "maps", "evaluate")
    return read_dataset(recipe, lists)  # type: ignore[arg-type]


def labels_of(dataset: Dataset) -> dict[str, set[str]]:
    names = dataset.classes.names
    return {name: {names[n] for n in item.labels} for name, item in dataset.items.items()}


def table(*lines: str, head: str = "image,labels", masks: int = 0) -> Files:
    """A table whose images are there, with masks of the value 1 if wanted."""
    names = [line.split(",")[0] for line in lines]
    return {
        "labels.csv": "\n".join([head, *lines]) + "\n",
        **{f"images/{name}.png": "" for name in names},
        **{f"masks/{name}.png": 1 for name in names[:masks]},
    }


VOC = {
    "ImageSets/Segmentation/train.txt": "a\nb\n",
    "ImageSets/Segmentation/val.txt": "a\nb\n",
    "ImageSets/Segmentation/train_aug.txt": "a\nb\n",
    "Annotations/a.xml": "<annotation><object><name>cow</name></object></annotation>",
    "Annotations/b.xml": "<annotation><object><name>hen</name></object></annotation>",
    "JPEGImages/a.jpg": "",
    "JPEGImages/b.jpg": "",
    "class_names.txt": "cow\nhen\n",
}
SHAPES = '{"version": "5.4.1", "shapes": [], "imagePath": "a.jpg"}'
LIST_CELLS = ("""a,"['cow', 'dog']\"""", '''b,"[""dog""]"''')


def coco(*categories: str, labels: Sequence[int] = (1, 2)) -> str:
    """Images a, b, ... with an object of a category each, a square of 2 pixels."""
    square = [0, 0, 2, 0, 2, 2, 0, 2]
    return json.dumps(
        {
            "images": [
                {"id": n, "file_name": f"{'abc'[n]}.png", "height": 8, "width": 8}
                for n in range(len(labels))
            ],
            "annotations": [
                {"id": n, "image_id": n, "category_id": c, "iscrowd": 0, "area": 4}
                | {"bbox": [0, 0, 2, 2], "segmentation": [square]}
                for n, c in enumerate(labels)
            ],
            "categories": [{"id": n, "name": name} for n, name in enumerate(categories, 1)],
        }
    )


REFUSED: dict[str, tuple[Files | Sequence[str], str, str]] = {
    # folders
    "folders of classes": (["cat/1.jpg", "dog/1.jpg"], "", "cat (1 images).*--labels folders"),
    "splits of ImageFolder": (["train/cat/1.jpg", "val/cat/2.jpg"], "folders", "{root}/train"),
    "Kaggle's sets": (
        ["training_set/cats/1.jpg", "test_set/cats/2.jpg"],
        "",
        "{root}/training_set",
    ),
    "seg_train": (["seg_train/sea/1.jpg", "seg_test/sea/2.jpg"], "folders", "{root}/seg_train"),
    "one outer folder": (["pets/cat/1.jpg", "pets/dog/2.jpg"], "folders", "{root}/pets"),
    "folder of images": (["imgs/1.jpg", "imgs/2.jpg"], "folders", "labels.csv"),
    "masks among classes": (["cat/images/1.jpg", "cat/masks/1.png"], "folders", "'masks'"),
    "classes of two levels": (["pet/cat/1.jpg", "farm/cow/2.jpg"], "folders", "{root}/farm"),
    "a split among classes": (["cat/1.jpg", "dog/1.jpg", "test/1.jpg"], "folders", "test mean"),
    "Cityscapes as classes": (["leftImg8bit/a/1.png", "gtFine/a/1.png"], "folders", "gtFine"),
    "folders by date": (["2021-03-04/1.jpg", "20210305/1.jpg"], "folders", "20210305 mean"),
    "folders of a year": (["2021/1.jpg", "cow/1.jpg"], "folders", "which 2021 mean"),
    "folds": (["fold_1/1.jpg", "fold_2/1.jpg"], "folders", "which fold_1, fold_2 mean"),
    "left over": (["New folder (2)/1.jpg", "tmp/1.jpg"], "folders", "which New folder (2), tmp"),
    "labels of a split": (["cow/1.png", "train_labels/1.png"], "folders", "which train_labels"),
    "folder of none": (["cow/1.jpg", "background/1.jpg"], "folders", "--no-class background"),
    "folder of good": (["good/1.png", "crack/1.png"], "folders", "--no-class good"),
    "folder of two": (["cow&calf/1.png", "hen/1.png"], "folders", "--separator '&'"),
    "two known in a folder": (["cow/1.png", "hen/1.png", "cow_hen/2.png"], "folders", "'_'"),
    "MVTec AD": (
        ["train/good/1.png", "test/good/1.png", "test/hole/1.png", "ground_truth/hole/1_mask.png"],
        "",
        "MVTec.* {root}/test --labels folders --no-class good",
    ),
    "LabelMe": ({"a.jpg": "", "a.json": SHAPES}, "", "LabelMe"),
    "labelImg": ({"cow/a.jpg": "", "cow/a.xml": "<annotation verified='yes'>"}, "", "labelImg"),
    "CVAT": ({"images/a.jpg": "", "annotations.xml": "<?xml?>\n<annotations>"}, "", "CVAT"),
    "VIA": ({"a.jpg": "", "via.json": '{"_via_settings": {}}'}, "", "VIA"),
    "Supervisely": (
        {"ds/img/a.jpg": "", "ds/ann/a.jpg.json": "{}", "meta.json": "{}"},
        "",
        "Super",
    ),
    "DOTA": ({"images/a.png": "", "labelTxt/a.txt": "imagesource:x"}, "", "DOTA"),
    "Cityscapes": (["leftImg8bit/train/x/a.png", "gtFine/train/x/a.png"], "", "Cityscapes"),
    "MMSegmentation": (["img_dir/train/a.png", "ann_dir/train/a.png"], "", "MMSegmentation"),
    "COCO's results": ({"a.jpg": "", "r.json": '[{"image_id": 1}]'}, "", "r.json.*results"),
    "COCO cut off": ({"a.jpg": "", "c.json": '{"info": {},\n"images": ['}, "", "c.json.*--kind"),
    "TFRecord": ({"train.tfrecord-00000-of-00001": "x"}, "", "TFRecord"),
    "Parquet": ({"data/train-0.parquet": "x"}, "", "labels.csv"),
    "another table": ({"train.csv": "x", "cat/1.jpg": ""}, "", "--labels {root}/train.csv"),
    # several names in one
    "pipe": (table("a,cow|dog", "b,dog"), "", "line 2: 'cow|dog' .*--separator '|'"),
    "comma": (table('a,"cow,dog"'), "", "line 2: 'cow,dog' .*--separator ','"),
    "slash": (table("a,cow", "b,cow/dog"), "", "line 3: 'cow/dog' .*'/'"),
    "Python list": (table(LIST_CELLS[0]), "", "--separator 'list'"),
    "JSON list of one": (table(LIST_CELLS[1]), "", "--separator 'list'"),
    "Postgres array": (table('a,"{cow,dog}"'), "", "may be several"),
    "tab in a cell": (table("a,cow\tdog"), "", "--separator '\\t'"),
    "Chinese comma": (table("a,cow、dog"), "", "、"),
    "line end": (table('a,"cow\ndog"'), "", "--separator '\\n'"),
    "blank between known": (
        table("a,cow dog", "b,dog", "c,cow"),
        "",
        "'cow dog' .*--separator ' '",
    ),
    "plus between known": (table("a,cow+dog", "b,dog", "c,cow"), "", "--separator '+'"),
    "and between known": (table("a,cow and dog", "b,dog", "c,cow"), "", "--separator ' and '"),
    "capitals": (table("a,Cow", "b,cow"), "", "line 3: 'cow' differs from 'Cow'"),
    "boxes": (table("a,8,cow,0", head="filename,width,class,xmin"), "", "filename, width, class"),
    "no header": ({"labels.csv": "a.jpg,cow\nb.jpg,hen\n", "a.jpg": ""}, "", "'no header'"),
    "NumPy's list": (table("""a,"['cow' 'dog']\""""), "list", "no list of texts"),
    "other separator": (table("a,cow;dog|hen"), "|", "'cow;dog'"),
    "JSON lines": (
        {"labels.jsonl": '{"image": "a", "labels": ["cow,dog"]}', "a.png": ""},
        "",
        "line 1: 'cow,dog'",
    ),
    "columns": (table("a,1,0", head='image,"cow, big",dog'), "", "'cow, big'"),
    "one line of classes": ({**table("a,cow"), "classes.txt": "cow, dog\n"}, "", "'cow, dog'"),
    "numbered classes": ({**table("a,cow"), "classes.txt": "0 cow\n1 dog\n"}, "", "'0 cow'"),
    "indices": (table("a,0", "b,1", head="id,label"), "", "'0' is a number.*classes.txt"),
    "scores": (table("a,0.3,1", head="image,cow,dog"), "", "'0.3'"),
    # none of the classes
    "nan": (table("a,cow", "b,nan"), "", "line 3: 'nan' .*--no-class nan.*--classes"),
    "neg": (table("a,cow", "b,Neg"), "", "--no-class Neg"),
    "n/a": (table("a,cow", "b,N/A"), "", "--no-class N/A"),
    "No Finding": (table("a,mass", "b,No Finding"), "", "--no-class No Finding"),
    "background row": (table("a,cow", "b,_background_"), "", "--no-class _background_"),
    "void column": (table("a,1,0", head="image,void,cow"), "", "--no-class void"),
    "unlisted none": ({**table("a,none"), "classes.txt": "cow\n"}, "", "'none'.*--no-class none"),
    "mistyped": (table("a,cow", "b,nothin"), "--no-class nothing", "'nothin'"),
    # lists of classes and masks
    "background last": (
        {**table("a,cow", masks=1), "classes.txt": "cow\nbackground\n"},
        "",
        "'background' as class 2.*0 for",
    ),
    "ignore in the middle": (
        {**table("a,cow", masks=1), "classes.txt": "hen\n__ignore__\ncow\n"},
        "",
        "'__ignore__' as class 2",
    ),
    "background twice": (
        {**table("a,cow", masks=1), "classes.txt": "background\nbg\ncow\n"},
        "",
        "'bg' as class 1",
    ),
    "none first": ({**table("a,cow", masks=1), "classes.txt": "none\ncow\n"}, "", "'none' may"),
    "VOC's void": (
        {**VOC, "class_names.txt": "cow\nvoid\nhen\n", "SegmentationClass/a.png": 1},
        "",
        "'void' as class 2",
    ),
    "COCO's none": (
        {"annotations.json": coco("none", "cow"), "a.png": "", "b.png": ""},
        "",
        "--no-class none",
    ),
    # one image, one file
    "contradiction": (table("a,cow", "b,cow", "a,"), "", "'a' twice (lines 2 and 4"),
    "columns differ": (table("a,1,0", "a,0,1", head="image,cow,dog"), "", "lines 2 and 3"),
    "VOC's list": ({**VOC, "ImageSets/Segmentation/train.txt": "a\nb\na\n"}, "", "lines 1 and 3"),
    "two images of a name": ({**VOC, "JPEGImages/a.png": ""}, "", "a.jpg and .*a.png"),
    "nothing labelled": (table("a,", "b,"), "", "no image has a label"),
    "VOC's unknown": (
        {**VOC, "class_names.txt": "sheep\n"},
        "",
        "classes sheep.*'cow' in 1.*class_names.txt",
    ),
    "separator for COCO": ({"annotations.json": coco("cow")}, ",", "separator ',' .*coco.*folder"),
    "VOC's unknown of some": (
        {**{k: v for k, v in VOC.items() if k != "class_names.txt"}, "labelmap.txt": "cow:1,2,3::"},
        "",
        "'hen' in 1.*class_names.txt",
    ),
    "all are no class": (table("a,cow", "b,"), "--no-class cow", "--no-class names them all"),
    "yes and no": (table("a,yes", "b,no"), "", "'no' .*--no-class no"),
    "comment in classes": ({**table("a,cow"), "classes.txt": "# mine\ncow\n"}, "", "'# mine'"),
    "empty classes": ({**table("a,cow"), "classes.txt": "\n"}, "", "classes.txt is empty"),
    "zero byte": (table("a,co\0w"), "", "'co\\x00w'"),
    "spreadsheet": ({"labels.xlsx": "x", "a.png": ""}, "", "labels.xlsx is of a spreadsheet"),
    "YOLO's comma": (
        {"a.png": "", "a.txt": "0 0.5 0.5 0.2 0.2\n", "classes.txt": "cow, big\n"},
        "",
        "'cow, big'.*data.yaml",
    ),
    "300 classes with masks": (
        table(*(f"i{n},c{n:03}" for n in range(300)), masks=1),
        "--classes c290",
        "291",
    ),
    "300 classes": (table(*(f"i{n},c{n}" for n in range(300))), "", "--classes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_doubtful_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, answer, expected = REFUSED[case]
    root = build(tmp_path / "mine", files)
    words = answer.split() if answer.startswith("--") else []
    words = words or (["--labels", "folders"] if answer == "folders" else [])
    words = words or (["--separator", answer] if answer else [])
    message = refused(capsys, [str(root), *words])
    position = 0
    for part in expected.replace("{root}", str(root)).split(".*"):
        position = message.find(part, position)
        assert position >= 0, message


Expected = dict[str, int]
READ: dict[str, tuple[Files | Sequence[str], list[str], Labels, Expected]] = {
    "folders": (
        ["cat/1.jpg", "dog/images/1.JPEG"],
        ["--labels", "folders"],
        {"cat/1": ["cat"], "dog/images/1": ["dog"]},
        {"cat": 1, "dog": 2},
    ),
    "digits of folders": (
        ["0/1.png", "1/1.png"],
        ["--labels", "folders"],
        {"0/1": ["0"], "1/1": ["1"]},
        {"0": 1, "1": 2},
    ),
    "MVTec's test": (
        ["good/1.png", "crack/1.png", "poke/1.png"],
        ["--labels", "folders", "--no-class", "good"],
        {"good/1": [], "crack/1": ["crack"], "poke/1": ["poke"]},
        {"crack": 1, "poke": 2},
    ),
    "a class that means none": (
        ["NORMAL/1.png", "PNEUMONIA/1.png"],
        ["--labels", "folders", "--classes", "NORMAL,PNEUMONIA"],
        {"NORMAL/1": ["NORMAL"], "PNEUMONIA/1": ["PNEUMONIA"]},
        {"NORMAL": 1, "PNEUMONIA": 2},
    ),
    "folders beside a table": (
        {"labels.csv": "image,labels\ncat/1.png,tabby\n", "cat/1.png": ""},
        [],
        {"cat/1": ["tabby"]},
        {"tabby": 1},
    ),
    "pipe": (
        table("a,cow|dog", "b,dog"),
        ["--separator", "|"],
        {"a": ["cow", "dog"], "b": ["dog"]},
        {"cow": 1, "dog": 2},
    ),
    "lists": (
        table(*LIST_CELLS, "c,[]"),
        ["--separator", "list"],
        {"a": ["cow", "dog"], "b": ["dog"], "c": []},
        {"cow": 1, "dog": 2},
    ),
    "a name with a comma": (
        table('a,"tench, fish"', "b,hen"),
        ["--separator", ";"],
        {"a": ["tench, fish"], "b": ["hen"]},
        {"hen": 1, "tench, fish": 2},
    ),
    "imported names": (
        {**table('a,"tench, fish"'), "classes.txt": "tench, fish\nhen\n", "import.json": "{}"},
        [],
        {"a": ["tench, fish"]},
        {"tench, fish": 1},
    ),
    "NIH": (
        table("a,Mass|Hernia", "b,No Finding", head="Image Index,Finding Labels"),
        ["--separator", "|", "--no-class", "No Finding"],
        {"a": ["Hernia", "Mass"], "b": []},
        {"Hernia": 1, "Mass": 2},
    ),
    "Excel in Europe": (
        {
            "labels.csv": "\ufefffilename;label\r\na.png;cow\r\nb.png;hen\r\n",
            "a.png": "",
            "b.png": "",
        },
        [],
        {"a": ["cow"], "b": ["hen"]},
        {"cow": 1, "hen": 2},
    ),
    "Excel's Unicode text": (
        {"labels.csv": "path\tclass\na.png\tkö\n".encode("utf-16"), "a.png": ""},
        [],
        {"a": ["kö"]},
        {"kö": 1},
    ),
    "a row a label": (
        table("a,cow", "a,dog", "a,cow", head="image_id,class"),
        [],
        {"a": ["cow", "dog"]},
        {"cow": 1, "dog": 2},
    ),
    "tabs": (
        {"labels.tsv": "image\ttags\na\tcow;hen\n", "a.png": ""},
        ["--labels", "{root}/labels.tsv"],
        {"a": ["cow", "hen"]},
        {"cow": 1, "hen": 2},
    ),
    "blank in a name": (
        table("a,hot dog", "b,dog"),
        [],
        {"a": ["hot dog"], "b": ["dog"]},
        {"dog": 1, "hot dog": 2},
    ),
    "numbers that are names": (
        {**table("a,7", "b,9", head="id,target"), "classes.txt": "9\n7\n"},
        [],
        {"a": ["7"], "b": ["9"]},
        {"9": 1, "7": 2},
    ),
    "labelme's classes": (
        {
            **table("a,cow", "b,_background_", masks=2),
            "classes.txt": "__ignore__\n_background_\ncow\n",
        },
        [],
        {"a": ["cow"], "b": []},
        {"cow": 1},
    ),
    "none in the list": (
        {**table("a,cow", "b,none"), "classes.txt": "cow\nnone\n"},
        [],
        {"a": ["cow"], "b": ["none"]},
        {"cow": 1, "none": 2},
    ),
    "background column": (
        table("a,1,0", "b,1,1", head="image,background,cow", masks=2),
        ["--no-class", "background"],
        {"a": [], "b": ["cow"]},
        {"cow": 1},
    ),
    "background of COCO": (
        {"annotations.json": coco("background", "cow", labels=(2, 2)), "a.png": "", "b.png": ""},
        [],
        {"a": ["cow"], "b": ["cow"]},
        {"cow": 1},
    ),
    "COCO's none": (
        {"annotations.json": coco("none", "cow", labels=(1, 2)), "a.png": "", "b.png": ""},
        ["--no-class", "none"],
        {"a": [], "b": ["cow"]},
        {"cow": 1},
    ),
    "two of 300 COCO categories": (
        {
            "annotations.json": coco(*(f"c{n}" for n in range(300)), labels=(3, 299)),
            "a.png": "",
            "b.png": "",
        },
        ["--classes", "c2,c4"],
        {"a": ["c2"], "b": []},
        {"c2": 3},
    ),
    "a high one of 300 COCO categories": (
        {
            "annotations.json": coco(*(f"c{n}" for n in range(300)), labels=(300, 2)),
            "a.png": "",
            "b.png": "",
        },
        ["--classes", "c1,c299"],
        {"a": ["c299"], "b": ["c1"]},
        {"c1": 1, "c299": 2},
    ),
    "a high one of 300 classes": (
        table("a,c299", *(f"i{n},c{n:03}" for n in range(300))),
        ["--classes", "c299"],
        {"a": ["c299"], **{f"i{n}": [] for n in range(299)}, "i299": ["c299"]},
        {"c299": 1},
    ),
    "two of 300 classes": (
        {**table("a,c1", "b,c299"), "classes.txt": "".join(f"c{n}\n" for n in range(300))},
        ["--classes", "c1,c2"],
        {"a": ["c1"], "b": []},
        {"c1": 2},
    ),
    "VOC's endings": (
        {
            **{k: v for k, v in VOC.items() if "JPEG" not in k},
            **{"JPEGImages/a.JPG": "", "JPEGImages/b.png": "", "SegmentationClass/b.PNG": 2},
            "ImageSets/Segmentation/train.txt": "a.JPG\nJPEGImages/b.png SegmentationClass/b.png\n",
        },
        [],
        {"a": ["cow"], "b": ["hen"]},
        {"cow": 1, "hen": 2},
    ),
    "VOC's background first": (
        {**VOC, "class_names.txt": "background\ncow\nhen\n", "SegmentationClass/a.png": 1},
        [],
        {"a": ["cow"], "b": ["hen"]},
        {"cow": 1, "hen": 2},
    ),
    "VOC 2007's lists of detection": (
        {f"VOC2007/{k.replace('Segmentation/', 'Main/')}": v for k, v in VOC.items()}
        | {"VOC2007/ImageSets/Main/cow_train.txt": "a 1\nb -1\n"},
        [],
        {"a": ["cow"], "b": ["hen"]},
        {"cow": 1, "hen": 2},
    ),
    "an object that is none": (
        {**VOC, "class_names.txt": "cow\n"},
        ["--no-class", "hen"],
        {"a": ["cow"], "b": []},
        {"cow": 1},
    ),
}


@pytest.mark.parametrize("case", READ)
def test_clear_is_read_rightly(case: str, tmp_path: Path, model: list[str]) -> None:
    files, words, labels, values = READ[case]
    root = build(tmp_path / "mine", files)
    dataset = opened(root, [word.replace("{root}", str(root)) for word in words], model)
    assert labels_of(dataset) == {name: set(of) for name, of in labels.items()}
    assert dict(zip(dataset.classes.names, dataset.classes.mask_ids, strict=True)) == values
    masks = sum("mask" in name.lower() or "Class/" in name for name in files)
    if not isinstance(files, Sequence):
        assert sum(item.mask is not None for item in dataset.items.values()) == masks


@pytest.mark.parametrize(
    ("text", "separator", "expected"),
    [
        ("cow; ;dog ", None, ("cow", "dog")),
        ("('cow', \"dog's\")", "list", ("cow", "dog's")),
        ('["a, b"]', "list", ("a, b",)),
        ("cow\tdog", r"\t", ("cow", "dog")),
        ("cow  dog", " ", ("cow", "dog")),
        ("a|b", ";", ("a|b",)),
    ],
)
def test_separators(text: str, separator: str | None, expected: tuple[str, ...]) -> None:
    assert split_labels(text, "here", separator) == expected


def test_names_that_are_never_several() -> None:
    assert split_labels("n/a", "here") == ("n/a",)
    assert split_labels("a/b;c", "here", known=["a/b"]) == ("a/b", "c")


def test_a_run_reads_what_init_was_told(tmp_path: Path, model: list[str]) -> None:
    """Labels with another separator and a label that means none, until the scored seeds."""
    root = draw_folder(tmp_path / "boxes")
    text = (root / "labels.csv").read_text()
    text = text.replace(";", "|").replace("i03.png,", "i03.png,nan")
    (root / "labels.csv").write_text(text)
    words = ["--separator", "|", "--no-class", "nan"]
    assert main(["init", str(root), *model, *words]) == 0
    values = {"run.folder": str(tmp_path / "run"), "run.threads": "1", "lpcam.clusters": "3"}
    values |= {"lpcam.scales": "[1.0]", "report.images": "0", "sheet.images": "2"}
    options = [word for key, value in values.items() for word in (f"--{key}", value)]
    assert main(["run", str(root / "recipe.yaml"), "--until", "seeds", *options]) == 0
    shown = {path.stem: read_index_mask(path) for path in (tmp_path / "run/seeds").glob("*.png")}
    assert len(shown) == 12 and not shown["i03"].any()
    names = (root / "labels.csv").read_text().split("\n")[1:]
    for line in filter(None, names):
        name, labels = line.split(",")
        values = {1 + sorted(COLOURS).index(label) for label in labels.split("|") if label != "nan"}
        assert {*np.unique(shown[name[:-4]]).tolist()} <= {0, 255, *values}
