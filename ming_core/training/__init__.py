"""The former place of the built-in model's training, which is now `tiny_shapes.training`."""
