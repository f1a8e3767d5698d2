"""The exported folder of a model that writes captions, used without flipscale."""

from pathlib import Path

import pytest
import torch
from hub.conftest import TOWER
from hub.test_export import environment_of, run_stranger
from PIL import Image
from transformers import AutoTokenizer

from flipscale.data.tokenizers import begin_and_end, bert_tokenizer
from flipscale.hub.export import build_processor, export_model
from flipscale.model import FlipConfig, FlipDecoderConfig, FlipForConditionalGeneration, FlipModel, FlipProcessor
from flipscale.objectives.captioning import CaptioningFlipModel

# Runs in an environment without flipscale and prints its results as JSON.
STRANGER = """
import importlib.util, json, sys
assert importlib.util.find_spec("flipscale") is None
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
folder, image = sys.argv[1:]
image = Image.open(image)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=image, return_tensors="pt")
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
ids = {str(beams): model.generate(**inputs, num_beams=beams).tolist() for beams in (1, 3)}
write = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
told = {text: write(images=image, text=text)[0]["generated_text"] for text in ("", "a")}
both = write(images=[image, image], text=["", ""], generate_kwargs={"num_beams": 3})
many = [one["generated_text"] for one in both]
print(json.dumps({"ids": ids, "told": told, "many": many, "class": type(AutoModel.from_pretrained(
    folder, trust_remote_code=True)).__name__}))
"""


def written_folder(kind: type, tokenizer_dir: Path, out_dir: Path) -> Path:
    """Export a model whose captions are of several words."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    text = {**TOWER, "vocab_size": 16, "max_position_embeddings": 8}
    config = FlipConfig(
        vision_config={**TOWER, "image_size": 32, "patch_size": 8},
        text_config=text if kind is CaptioningFlipModel else None,
        decoder_config={**text, **begin_and_end(tokenizer)},
    )
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        model.decoder.lm_head.weight.mul_(20.0)
        model.decoder.embeddings.token_embedding.weight.mul_(20.0)
    return export_model(model, build_processor(config, tokenizer), out_dir)


@pytest.mark.parametrize(
    ("kind", "is_also"),
    [(CaptioningFlipModel, "FlipModel"), pytest.param(FlipForConditionalGeneration, None, marks=pytest.mark.long)],
)
def test_captions_without_flipscale(
    caption_tokenizer: Path, image: Path, tmp_path: Path, kind: type, is_also: str | None
) -> None:
    folder = written_folder(kind, caption_tokenizer, tmp_path / "model")
    seen = run_stranger(environment_of(tmp_path / "venv", "torch", "transformers", "pillow"), STRANGER, folder, image)
    model = FlipForConditionalGeneration.from_pretrained(folder).eval()
    processor = FlipProcessor.from_pretrained(folder)
    inputs = processor(images=Image.open(image), return_tensors="pt")
    texts = {}
    for beams in (1, 3):
        ids = model.generate(**inputs, num_beams=beams, use_cache=False)
        assert seen["ids"][str(beams)] == ids.tolist()
        texts[beams] = processor.decode(ids[0], skip_special_tokens=True)
        assert "<s>" not in texts[beams]
        assert texts[beams]
    assert seen["told"][""].strip() == texts[1].strip()
    assert seen["told"]["a"].startswith("a")
    assert [one.strip() for one in seen["many"]] == [texts[3].strip()] * 2
    assert seen["class"] == (is_also or "FlipForConditionalGeneration")
    files = {path.name for path in folder.iterdir()}
    assert {"modeling_flip_caption.py", "generation_config.json"} <= files
    assert ("modules.json" in files) == (is_also is not None)
    if is_also:
        assert FlipModel.from_pretrained(folder).text_model is not None


def test_bert_tokens_begin_and_end_captions(tmp_path: Path) -> None:
    """In a caption they stay text."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "bird", "[", "]", "cl", "##s"]
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    bare = bert_tokenizer(tmp_path / "vocab.txt", 8)
    assert begin_and_end(bare) == {"bos_token_id": 2, "eos_token_id": 3}
    text = {**TOWER, "vocab_size": 11, "max_position_embeddings": 8}
    decoder = FlipDecoderConfig(**text, bos_token_id=2, eos_token_id=3)
    config = FlipConfig(vision_config={**TOWER, "image_size": 32, "patch_size": 8}, decoder_config=decoder)
    build_processor(config, bare).save_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer("a red bird [CLS]")["input_ids"] == bare("a red bird [CLS]")["input_ids"] == [4, 5, 6, 7, 9, 10, 8]
    assert tokenizer.decode([2, 4, 5, 6, 3, 0, 0], skip_special_tokens=True) == "a red bird"
