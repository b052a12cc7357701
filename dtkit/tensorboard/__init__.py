"""TensorBoard: what a run measured as event files, and the program that shows them."""
