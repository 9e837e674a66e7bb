"""A fleet: the bundles of one source for several targets, side by side in one folder, from one recipe."""
