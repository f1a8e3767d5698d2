"""accelerate's launch files and the Slurm scripts, as package data.

`ds_configs` and `slurm` are symbolic links to the folders at the top of the repository. setuptools follows the links,
so a wheel contains the files.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
