"""The same cell again and again: sweeps, the search for a batch size, and advice on settings."""
