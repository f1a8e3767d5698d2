"""ImageNet-ReaL: several right classes for each validation image, found by the file name that its shard keeps."""

import importlib.util
import json
import re
from pathlib import Path

from flipscale.data.sources.tar_source import TarSource
from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError

REAL_LABELS = "real_labels.json"
# timm has the labels that Beyer et al. (2020) published: of image ILSVRC2012_val_00000001, of 00000002, ...
_FILE = "data/_info/imagenet_real_labels.json"


def find_labels() -> Path:
    """Return the file with the labels, in the package timm.

    Raises:
        ValueError: timm is not installed.
    """
    found = importlib.util.find_spec("timm")
    path = Path(found.origin).parent / _FILE if found and found.origin else None
    if path is None or not path.is_file():
        raise UserError("the labels of ImageNet-ReaL come in the package timm; `pip install timm`")
    return path


def write_real_labels(place: Path, shards: str) -> None:
    """Write `real_labels.json` to `place`: the classes of each image of the shards, in their order.

    Raises:
        ValueError: the images are not called as ImageNet's, or their own classes are mostly no label of theirs.
    """
    labels: list[list[int]] = json.loads(find_labels().read_text(encoding="utf-8"))
    source = TarSource(shards)
    found, labelled, agreeing = [], 0, 0
    for shard, size in enumerate(source.shard_sizes):
        for number in range(size):
            key = source.key(shard, number)
            called = re.fullmatch(r"(?:.*/)?ILSVRC2012_val_(\d{8})", key)
            if called is None or not 1 <= int(called[1]) <= len(labels):
                raise UserError(
                    f"{source.shard_name(shard)} has an image {key}, not ILSVRC2012_val_...; it has changed"
                )
            found.append(labels[int(called[1]) - 1])
            labelled += bool(found[-1])
            agreeing += source.read_label(shard, number) in found[-1]
    # Nine in ten do; of labels in another order, one in a thousand would.
    if 2 * agreeing < labelled:
        raise UserError(f"{agreeing} of {labelled} images have their class among their labels; the source has changed")
    write_text(place / REAL_LABELS, json.dumps(found) + "\n")
