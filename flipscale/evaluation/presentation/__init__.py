"""What shows results: curves of runs, figures, and `results.md`."""
