"""The hotgraph daemon: one language model hot on one device, shared over gRPC."""
