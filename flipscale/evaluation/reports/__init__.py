"""What people read of results: tables, figures and the lines that they are made from."""
