"""The model: configuration, layers, routing, stages, cost, and the reference generator."""
