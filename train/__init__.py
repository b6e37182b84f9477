"""Training: recipes, data, the step and the loop. `python -m train RECIPE`, or `jaxkv train RECIPE`.

A recipe is a frozen `train.config.Recipe` in a file of `train/recipes`; every field of it can be set from the command line.
"""
