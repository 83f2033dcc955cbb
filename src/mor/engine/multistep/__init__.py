"""Several decode steps in a row on the device, while the host waits.

In reading order:

- `scheduler.py`: when steps may run in a row, and what the host makes of them afterwards.
- `device_decoder.py`: the steps themselves, with all decisions in tensors.
- `cuda_graphs.py`: functions and layer stacks that are recorded once and then replayed.
"""
