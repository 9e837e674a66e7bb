"""Runners: engines that compute a bundle's parts behind one shell, and a bundle opened as a Model."""
