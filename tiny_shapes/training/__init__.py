"""Training of the built-in model, from nothing: `python -m tiny_shapes.training`.

    recipe.py          the sizes, and the stages: what is trained, on which tasks, for how long
    text_tokenizer.py  the text tokenizer
    images.py          the images that MingTok is trained on
    sequences.py       dialogues as token sequences, guidance rows among them
    packing.py         sequences packed into batches, with all that the losses need
    data.py            the batches of a stage by step, and the loader that makes them
    initialization.py  random weights to begin with
    mingtok_loss.py    what MingTok is trained to do
    joint_loss.py      what the language model and the flow head are trained to do
    optimizers.py      Muon and AdamW, the learning rate, the moving average of the weights
    stages.py          data, loss, evaluation and export of a stage put together
    loop.py            steps, checkpoints, resuming
    plot.py            the log as a plot

All data is made on the fly from the procedural world of `tiny_shapes.world`, training split only.
"""
