"""The state of a process: its place among the others, signals, streams, locks and watchdogs."""
