"""What dtkit costs, measured against what people use today. `make bench` runs it."""
