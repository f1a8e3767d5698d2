"""Write copies of accelerate's launch files and the Slurm scripts, for users to edit: `flipscale launch_files DIR`."""

import shutil
from dataclasses import dataclass

from flipscale.engines.launch_files import FOLDER
from flipscale.io.atomic import atomic_write
from flipscale.io.command_line import OutputFolder
from flipscale.io.errors import UserError


@dataclass(frozen=True)
class LaunchFiles:
    """Write accelerate's launch files and the Slurm scripts into a folder.

    Args:
        directory: Folder that receives ds_configs/ and slurm/, such as `.`. Start training from it.
    """

    directory: OutputFolder

    def run(self) -> None:
        """Write the missing files and print the paths of all. Write none if a file has other content."""
        sources = [file for name in ("ds_configs", "slurm") for file in sorted((FOLDER / name).iterdir())]
        copies = {source: self.directory / source.relative_to(FOLDER) for source in sources}
        for source, copy in copies.items():
            if copy.exists() and not (copy.is_file() and copy.read_bytes() == source.read_bytes()):
                raise UserError(
                    f"{copy} exists and differs from this version's; nothing was written: move it, or name another "
                    "folder"
                )
        for source, copy in copies.items():
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(copy) as partial:
                    shutil.copyfile(source, partial)
        print("\n".join(map(str, copies.values())))
