"""Checkpoints: taken between two steps, written beside the training, loaded without pickle.

`face` is what users call, `part` works in a run, `source` finds what a cell
trains, `tree` takes states apart, `write` and `read` go to the disk, and in
`ranks` the ranks talk.
"""
