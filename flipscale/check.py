"""Check recipes before they wait in a queue: their fields and flags, the launch file and the number of processes.

Data, test sets, GPUs, the Hub and other processes stay unopened, so the check runs where jobs are submitted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flipscale.io.command_line import parse_known
from flipscale.io.errors import UserError
from flipscale.io.model_folder import is_path, local_folder
from flipscale.io.options import Count


@dataclass(frozen=True, kw_only=True)
class Check:
    """Check recipes before they wait in a queue: their fields and flags, the launch file and the number of processes.

    All other options are those of `flipscale pretrain`. Data, test sets, GPUs and the Hub are not opened: only
    the start of the run shows whether they are there. --dry_run of `flipscale pretrain` also computes memory and time.

    Args:
        config: A recipe file or name. Several are checked one after the other, each with the same flags.
        launch_file: Accelerate's launch file. Default: this process's launch.
        num_processes: Number of processes. Default: the launch file's.
        num_machines: Number of machines. Default: the launch file's.
        pending: Start weights may be missing, because another job writes them.
    """

    config: list[list[str]] = field(default_factory=list)
    launch_file: Path | None = None
    num_processes: Count | None = None
    num_machines: Count | None = None
    pending: bool = False


def main(arguments: Sequence[str]) -> None:
    """Print a line for each recipe that can run. Raise UserError for the first that cannot."""
    args, flags = parse_known(Check, arguments, "flipscale check")
    names, *others = args.config or [[]]
    flags = [*(word for other in others for name in other for word in ("--config", name)), *flags]
    from flipscale.data.tokenizers import model_tokenizer
    from flipscale.engines.build import engine_class
    from flipscale.evaluation.suite import check_image_sizes
    from flipscale.hub.push import target_of
    from flipscale.planning.budget import with_time_shares
    from flipscale.planning.dry_run import planned_launch
    from flipscale.runs.complete_recipe import parse_recipe
    from flipscale.training.session import open_run_directory
    from flipscale.training.setup import check_settings

    launch = planned_launch(args.launch_file, args.num_processes, args.num_machines)
    for words in [["--config", name] for name in names] or [[]]:
        recipe = with_time_shares(parse_recipe([*words, *flags], is_saved=args.pending))
        model = recipe.model
        target_of(recipe.hub)
        if open_run_directory(recipe) is None and not args.pending:
            for start in filter(None, (model.init_from, model.vision, model.text)):
                local_folder(start)
        # The towers' fields come with their weights.
        if not (args.pending and model.family == "towers"):
            objective, config, _ = check_settings(recipe, (0, launch.num_processes))
            # Names on the Hub are not looked up.
            if objective.takes_text and not args.pending and is_path(recipe.data.tokenizer):
                model_tokenizer(recipe.data.tokenizer, config.caption_config)
            check_image_sizes(recipe.eval, config.vision_config.patch_size)
        if refusal := engine_class(launch).refusal(launch, recipe.optim.name, bool(model.compile)):
            raise UserError(refusal)
        count, pairs = launch.num_processes, recipe.data.global_batch_size
        print(
            f"{''.join(words[1:]) or 'the recipe'} can run with {launch.engine} on {count:,} process"
            f"{'es' * (count != 1)} of {pairs // count:,} pairs; data and GPUs were not looked at"
        )
