"""The recipe: every setting of a run, as frozen dataclasses without torch."""
