"""Tensor functions, one a file: the plain torch reference of each, and beside it what a GPU runs. They know no model."""
