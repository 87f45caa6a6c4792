"""Studies of several runs: arms and seeds, one table each."""
