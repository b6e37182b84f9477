"""Training: recipes, the step and the loop. Nothing is here yet; `infer` runs published checkpoints."""
