"""A model on the Hub: `flipscale push runs/NAME ORG/NAME`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `flipscale push` takes."""
    parser.add_argument(
        "run_dir", metavar="RUN", type=Path, help="a run directory, whose model/ is pushed, or a model folder"
    )
    parser.add_argument("repo", metavar="ORG/NAME", help="the model's name on the Hub; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make it a private one")
    parser.add_argument("--revision", help="the branch to push to, made if it does not exist; by default main")
    parser.add_argument("--dry_run", action="store_true", help="only print what would be uploaded; asks no network")


def run(args: argparse.Namespace) -> None:
    """Pushes and prints where to; a push of what is there already uploads nothing.

    Raises:
        ValueError: no model there, a name that is none, no token, no right to write.
        OSError: the Hub could not be reached.
    """
    from flipscale.hub.push import Target, files_to_push, push_folder

    target = Target(args.repo, args.private or None, args.revision)
    folder = model_folder(args.run_dir)
    if args.dry_run:
        files = files_to_push(folder)
        print("\n".join(f"{size:>16,}  {name}" for name, size in files))
        total = sum(size for _, size in files)
        print(f"{total:>16,}  bytes in {len(files)} files of {folder} would go to {target}")
        return
    pushed = push_folder(folder, target, f"Push {args.run_dir.name} with flipscale")
    print(f"{pushed.url}: {'commit ' + pushed.commit if pushed.changed else 'nothing new, nothing uploaded'}")


def model_folder(run: Path) -> Path:
    """The model folder of a run directory, or `run` itself where that is one.

    Raises:
        ValueError: it is neither.
    """
    for folder in (run / "model", run):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(
        f"{run} has no model to push: neither {run}/model/config.json nor {run}/config.json is there; finish the run"
    )
