"""The contract of hotgraph."""
