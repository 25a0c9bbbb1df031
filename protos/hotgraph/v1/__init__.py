"""The contract of hotgraph, version 1: messages and stubs generated from the protos beside this file."""
