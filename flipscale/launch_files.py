"""Write copies of accelerate's launch files and the Slurm scripts, for users to edit: `flipscale launch_files DIR`.

Both are package data: `flipscale/ds_configs` and `flipscale/slurm` are symbolic links to the folders at the top
of the repository. setuptools follows the links, so a wheel contains the files.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from flipscale.io.atomic import atomic_write
from flipscale.io.command_line import OutputFolder
from flipscale.io.errors import UserError

FOLDERS = ("ds_configs", "slurm")
_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class LaunchFiles:
    """Write accelerate's launch files and the Slurm scripts into a folder.

    Args:
        directory: Folder that receives ds_configs/ and slurm/, such as `.`. Start training from it.
    """

    directory: OutputFolder

    def run(self) -> None:
        """Write the missing files and print the paths of all. Write none if a file has other content."""
        sources = [file for name in FOLDERS for file in sorted((_PACKAGE / name).iterdir())]
        copies = {source: self.directory / source.relative_to(_PACKAGE) for source in sources}
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
