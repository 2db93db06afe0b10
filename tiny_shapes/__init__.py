"""The built-in model: the procedural world that it lives in, its training, and its evaluation.

    world/       scenes, their words, the tasks, and the scorer; knows nothing of a model
    evaluation/  how well a model does the tasks of the world; uses `ming_core`
    training/    trains a model from nothing; uses both

`ming_core` is imported by its own name, so commands are run from the project's root:

    python -m tiny_shapes.training
    python -m tiny_shapes.evaluation
"""
