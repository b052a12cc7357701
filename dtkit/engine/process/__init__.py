"""What makes this process an engine, with a run or without: shell, agent, place in the group."""
