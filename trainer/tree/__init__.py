"""Token trees: what rows share is computed once. `core` is the tree, `sharing` how a trainer uses it."""
