"""Prepare data: shards, test sets, inspection and audit."""
