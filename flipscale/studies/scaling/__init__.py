"""How the error of models falls with what was spent on them, and what each thing that was spent on moves."""
