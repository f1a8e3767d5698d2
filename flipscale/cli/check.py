"""Check recipes before they wait in a queue: their fields and flags, the launch file and the number of processes.

Data, test sets, GPUs, the Hub and other processes stay unopened, so the check runs where jobs are submitted.
"""

from dataclasses import dataclass, field
from pathlib import Path

from flipscale.io.command_line import OTHERS
from flipscale.io.model_folder import local_folder
from flipscale.io.options import Count


@dataclass(frozen=True, kw_only=True)
class Check:
    """Check recipes before they wait in a queue: their fields and flags, the launch file and the number of processes.

    All other options are those of `flipscale pretrain`. Data, test sets, GPUs and the Hub are not opened: only
    the start of the run shows whether they are there. A tokenizer and start weights on this machine are read. --dry_run
    of `flipscale pretrain` reads no files, and also computes memory and time.

    Args:
        config: A recipe file or name. Several are checked one after the other, each with the same flags.
        launch_file: Accelerate's launch file. Default: this process's launch.
        num_processes: Number of processes. Default: the launch file's.
        num_machines: Number of machines. Default: the launch file's.
        pending: Start weights may be missing, because another job writes them.
        flags: A recipe's flags.
    """

    config: list[list[str]] = field(default_factory=list)
    launch_file: Path | None = None
    num_processes: Count | None = None
    num_machines: Count | None = None
    pending: bool = False
    flags: list[str] = field(default_factory=list, metadata=OTHERS)

    def run(self) -> None:
        """Print a line for each recipe that can run. Raise UserError for the first that cannot."""
        names, *others = self.config or [[]]
        flags = [*(word for other in others for name in other for word in ("--config", name)), *self.flags]
        from flipscale.checks.start import check_recipe
        from flipscale.planning.budget import with_time_shares
        from flipscale.planning.dry_run import planned_launch
        from flipscale.recipe.rules import check_rules
        from flipscale.start.complete_recipe import parse_recipe
        from flipscale.start.pretrained_fields import with_vocabulary
        from flipscale.start.run_files import is_done, open_run_directory

        launch = planned_launch(self.launch_file, self.num_processes, self.num_machines)
        for words in [["--config", name] for name in names] or [[]]:
            recipe = with_time_shares(parse_recipe([*words, *flags], is_saved=self.pending))
            model, checkpoint, folders = recipe.model, open_run_directory(recipe), list[Path | None]()
            is_done(recipe, checkpoint)
            if checkpoint is None and not self.pending:
                folders = [local_folder(start) for start in (model.init_from, model.vision, model.text) if start]
            if reads_start := bool(folders) and None not in folders:
                recipe = with_vocabulary(recipe, fetches=True)
            check_rules(recipe)
            # The towers' fields come with their weights.
            if not (self.pending and model.family == "towers"):
                check_recipe(recipe, launch, not self.pending, reads_start)
            count, pairs = launch.num_processes, recipe.data.global_batch_size
            print(
                f"{''.join(words[1:]) or 'the recipe'} can run with {launch.engine} on {count:,} process"
                f"{'es' * (count != 1)} of {pairs // count:,} pairs; data and GPUs were not looked at"
            )
