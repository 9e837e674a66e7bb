"""What follows from a part's layers: names of blocks, points, costs, stages, and where to cut for several devices."""
