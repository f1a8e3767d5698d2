"""`python -m flipscale.cli VERB`, for launchers and batch scripts."""

from flipscale.cli import main

main()
