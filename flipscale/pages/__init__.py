"""Pages to look at in a browser: one HTML file each, with its pictures in it and nothing that it asks of a network."""
