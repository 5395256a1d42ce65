"""The operation graph: environment work is done once. `core` is the graph, `pool` how episodes walk it."""
