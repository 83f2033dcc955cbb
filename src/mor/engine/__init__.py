"""The inference engine: continuous depth-wise batching on ragged paged key-value memory."""
