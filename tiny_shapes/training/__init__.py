"""Training of the built-in model, from nothing: `python -m ming_core.training`.

    recipe.py      the sizes, and the stages: what is trained, on which tasks, for how long
    tokenizer.py   the text tokenizer
    pictures.py    the stream of pictures that MingTok learns from
    sequences.py   dialogues as token sequences, guidance rows among them, packed into batches
    objectives.py  what the models are asked to do
    optimizers.py  Muon and AdamW, the learning rate, the moving average
    stages.py      data, objective, evaluation and output of a stage put together
    probe.py       a quick look at what the model can do so far
    loop.py        steps, checkpoints, resuming
    plot.py        the log as a picture
    evaluation.py  what the finished model can do, on many unseen scenes; a part of it is
    examiner.py    what every examination asks of a model,
    many.py        drawing for it, many pictures in one pass, and
    chains.py      five rounds of edits, three ways

All data is drawn on the fly from the procedural world of `tiny_shapes.world`, training split only.
"""
