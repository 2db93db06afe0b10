"""Evaluation of a model on the tasks of the world, on unseen scenes: `python -m tiny_shapes.evaluation`.

    evaluator.py  a model with its unseen scenes: what it sees, says and draws
    scores.py     a share or a mean, with its confidence interval
    suite.py      what is measured
    masked.py     edits inside a mask, the region of an edit found first, completion
    words.py      prompts as people type them, requests from outside, two images
    judging.py    what makes an answer or an edit right
    chains.py     chains of edits, five rounds long, in three ways
    report.py     the results as a table, as JSON and as a plot
    quick.py      a few figures in seconds, for a model in training

Every answer and image is judged by the scorer (`tiny_shapes.world.scoring`), which reads pixels alone.
"""
