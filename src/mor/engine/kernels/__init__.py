"""How the engine runs layers. In reading order:

- `layer_stack`: what a stack of layers and a backend are;
- `torch_backend`: operation by operation, with `mor.ops.reference` or `mor.ops.triton`;
- `cpu_backend`: one compiled call a stack, with `mor.ops.cpu`.
"""
