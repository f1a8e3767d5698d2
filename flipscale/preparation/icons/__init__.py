"""A third of a million drawings with names, of Iconify's whole collection: `flipscale prepare icons`."""
