"""The built-in model: its procedural world, its training and its evaluation."""
