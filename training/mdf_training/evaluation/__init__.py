"""How good a model is: scores and controls, baselines, statistics, the model card."""
