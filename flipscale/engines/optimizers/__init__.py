"""The optimisers: which parameters each of them moves, and Muon."""
