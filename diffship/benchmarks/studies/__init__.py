"""Programs that measure one of the project's results files each; in a clone, not in the wheel."""
