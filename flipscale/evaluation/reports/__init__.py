"""Reports of results: lines, tables and figures."""
