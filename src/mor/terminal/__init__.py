"""What the commands print on a terminal, or as plain text into a pipe.

In reading order: `console` (consoles, errors, progress bars), `table`, `color` (text colored by
recursion count), `training_progress` (the live line of `mor train`).
"""
