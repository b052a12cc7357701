"""What a notebook's kernel does with its ranks; it loads neither torch nor ipyparallel.

`session` is the face, `core` holds what it is made of, `cells` runs cells on the ranks. While a
cell runs, `supervisor` and `conductor` serve clicks and faults, `failures` puts those into words
and `repair` makes the group anew.
"""
