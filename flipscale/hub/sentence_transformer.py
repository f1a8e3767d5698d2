"""Make a model folder one that sentence-transformers loads too, and so mteb and all that is built on it.

sentence-transformers reads three JSON files of its own beside the model: the modules in their order, what the first
takes and calls, and the similarity. They are written as it writes them, without importing it.
"""

import json
from pathlib import Path

# The first release that has both modules under these names.
RELEASE = ">=6.0"
_MODULES = "sentence_transformers.base.modules"


def write_sentence_transformer(folder: Path) -> None:
    """Write the files that make the model folder a `SentenceTransformer` of texts and of images.

    It gives the embeddings of `FlipModel`'s forward, of unit length: the projected features of either tower, which the
    module `Normalize` scales. Captions are padded to the model's length and cut to it, as the processor does.
    """
    features = {
        kind: {"method": f"get_{kind}_features", "method_output_name": "pooler_output"} for kind in ("text", "image")
    }
    files = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": f"{_MODULES}.transformer.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Normalize", "type": f"{_MODULES}.normalize.Normalize"},
        ],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": features,
            "module_output_name": "sentence_embedding",
            # sentence-transformers would pad to the longest caption of a batch.
            "processing_kwargs": {"text": {"padding": "max_length", "truncation": True}},
        },
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "requirements": {"sentence_transformers": RELEASE},
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
