"""Model folders: written so that they load anywhere, read from other programs' checkpoints, described by a card."""
