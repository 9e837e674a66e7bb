"""The project's own pages from its results files, and the sentinels that hold the pages' claims."""
