"""Push a model to the Hub: `flipscale push runs/NAME ORG/NAME`."""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.io.options import CountOrZero, number
from flipscale.training.console import start_logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale push`."""
    parser.add_argument(
        "run_dir", metavar="RUN", type=Path, help="A run directory, whose model/ is uploaded, or a model folder."
    )
    parser.add_argument("repo", metavar="ORG/NAME", help="Name of the model on the Hub, created if it does not exist.")
    parser.add_argument("--step", type=number(CountOrZero), help="Upload the model of the checkpoint of this step.")
    parser.add_argument("--private", action="store_true", help="Create a private model.")
    parser.add_argument("--revision", help="Branch to upload to, created if it does not exist. Default: main.")
    parser.add_argument("--dry_run", action="store_true", help="Print the files to upload, without using the network.")


def run(args: argparse.Namespace) -> None:
    """Push a model and print its URL. If the Hub has the same files, nothing is uploaded."""
    from flipscale.hub.push import Target, check_to_push, left_out, push_folder, sort_files

    target = Target(args.repo, args.private or None, args.revision)
    title = args.run_dir.name + ("" if args.step is None else f", step {args.step}")
    start_logging()
    with _model_folder(args.run_dir, args.step) as folder:
        check_to_push(folder)
        if args.step is not None or not args.dry_run:
            _update_card(folder, args.run_dir, args.repo, args.step)
        if args.dry_run:
            files = {name: (folder / name).stat().st_size for name in sort_files(folder)[0]}
            print("\n".join(f"{size:>16,}  {name}" for name, size in files.items()))
            if others := left_out(folder):
                print(others)
            print(f"{sum(files.values()):>16,}  bytes in {len(files)} files of {title} would go to {target}")
            return
        url, commit = push_folder(folder, target, title)
    print(f"{url}: {f'commit {commit}' if commit else 'nothing new, nothing uploaded'}")


def _update_card(folder: Path, run_dir: Path, repo_id: str, step: int | None) -> None:
    """Put the model's Hub name into its card: rewrite a run's card, or replace the folder's name in another card."""
    from flipscale.hub.card import escape_string, write_card

    card = folder / "README.md"
    if card.is_symlink():
        return
    if (run_dir / "recipe.yaml").is_file():
        write_card(folder, run_dir, repo_id, step)
    elif card.is_file():
        try:
            text = card.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{card} is not UTF-8 ({error.reason}); write it again") from error
        write_text(card, text.replace(f'"{escape_string(str(folder))}"', f'"{repo_id}"'))


@contextmanager
def _model_folder(run_dir: Path, step: int | None) -> Iterator[Path]:
    """Yield the model folder of a run, `run_dir` itself if it is a model folder, or the export of a checkpoint."""
    if step is not None:
        from flipscale.engines.checkpoint import checkpoint_of
        from flipscale.hub.export import export_checkpoint
        from flipscale.hub.push import export_folder

        folder = export_folder(run_dir, step)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            yield export_checkpoint(checkpoint_of(run_dir, step), folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    for folder in (run_dir / "model", run_dir):
        if (folder / "config.json").is_file():
            yield folder
            return
    raise UserError(
        f"{run_dir} has no model to push: neither {run_dir}/model/config.json nor {run_dir}/config.json exists; "
        "finish the run, or name a checkpoint with --step"
    )
