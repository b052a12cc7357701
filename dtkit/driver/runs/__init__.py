"""One run of a cell: its folder, its events and output as they come, and reading it back later."""
