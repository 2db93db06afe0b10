"""One space for seeing and drawing, or two: the same small model trained both ways, with one budget.

The paper says that sharing the features of seeing and drawing makes training converge more than 3.5 times faster. Here
the claim is tried in small. `designs`: the two models; `figures`: what they can do; `report`: the table and the plot.
"""
