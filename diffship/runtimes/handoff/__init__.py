"""Several models draw one picture: which ones may, who computes which call, and what may arrive from elsewhere."""
