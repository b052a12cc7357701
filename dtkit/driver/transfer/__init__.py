"""Values on their way between the ranks and the notebook, however large."""
