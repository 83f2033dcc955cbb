"""How good a model is, and how deep its tokens go."""
