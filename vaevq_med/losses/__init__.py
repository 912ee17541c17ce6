"""Loss terms, one file each, and the objective that sums them."""
