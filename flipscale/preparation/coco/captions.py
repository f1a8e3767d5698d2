"""COCO's captions in the split of Karpathy and Li (2015): 113,287 images to learn from and 5,000 to test on, five
captions each.

The file of the split, dataset_coco.json, has four parts: train, val, test, and restval, the rest of COCO's own
validation set, which everybody trains on too.
"""

from pathlib import Path
from typing import Any

from flipscale.io.errors import UserError
from flipscale.preparation.coco.images import CocoList, image_file, read_entries, write_parts

SPLIT = "dataset_coco.json"
_WHERE = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
_PARTS = {"train": ("train", "restval"), "test": ("test",)}


def prepare_coco_captions(coco: Path, out_dir: Path, short_side: int, processes: int) -> dict[Path, dict[str, Any]]:
    """Write COCO's captions as shards to train/ and test/ in `out_dir`, and return the report of each. The same command
    goes on after an interruption.

    Args:
        coco: the folder with dataset_coco.json, train2014/ and val2014/.
        short_side: to which larger images are shrunk.

    Raises:
        ValueError: a file of `coco` is missing or another one, or as `write_shards`.
        OSError: as `write_shards`.
    """
    images = read_entries(coco / SPLIT, "images", _WHERE)
    found = [_image(coco / SPLIT, number, image) for number, image in enumerate(images)]
    parts = {}
    for part, splits in _PARTS.items():
        chosen = [(file, texts) for split, file, texts in found if split in splits]
        if not chosen:
            raise UserError(f"{coco / SPLIT} has no images of {' and '.join(splits)}; it comes whole in {_WHERE}")
        files = tuple(file for file, _ in chosen)
        parts[part] = CocoList(coco, files, files, tuple(texts for _, texts in chosen))
    return write_parts(parts, out_dir, short_side, processes)


def _image(path: Path, number: int, image: Any) -> tuple[str, str, tuple[str, ...]]:
    """Return the split, the path and the captions, each on one line, of an entry of the split's file.

    Raises:
        ValueError: it has other fields.
    """
    try:
        texts = tuple(" ".join(sentence["raw"].split()) for sentence in image["sentences"])
        file, split = image_file(image["filepath"], image["filename"]), str(image["split"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: images[{number}] is not as in {_WHERE} ({error!r}); unpack it again") from error
    if not any(texts):
        raise UserError(f"{path}: images[{number}] has no caption; unpack it again from {_WHERE}")
    return split, file, tuple(filter(None, texts))
