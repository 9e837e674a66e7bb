"""What export, start and memory cost, outside the suites of `bench`."""
