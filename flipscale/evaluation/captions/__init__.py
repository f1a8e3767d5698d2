"""How good generated captions are: their words, and the scores of them beside several reference captions."""
