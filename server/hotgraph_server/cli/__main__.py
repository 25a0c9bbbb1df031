"""`python -m hotgraph_server.cli` is `hotgraph`."""

from hotgraph_server.cli import main

main()
