"""How much memory training takes, told from the engine's own code before a single weight is there."""
