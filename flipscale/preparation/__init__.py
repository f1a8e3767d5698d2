"""Data made beforehand: shards, demo sets, inspection."""
