"""The card of a model in another program's form: how to load it there, what it was made from, under which licence."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


def derived_card(src: str, name: str, library: str, text: str) -> str:
    """A card, as Markdown, for `name`, a form of the model folder or Hub name `src` for `library`; its licence is that
    of the card of `src`, absent where that has none."""
    data = ModelCardData(
        library_name=library,
        license=_licence(src),
        pipeline_tag="zero-shot-image-classification",
        tags=["flip", "clip", "flipscale"],
        base_model=None if Path(src).exists() else src,
    )
    return f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{text}"


def _licence(src: str) -> str | None:
    try:
        # Of a folder without a card there is nothing to load; of a Hub name it may not be reached.
        return ModelCard.load(Path(src) / "README.md" if Path(src).is_dir() else src).data.license
    except (OSError, ValueError):
        return None
