"""Networks of other packages as tokenizers, one architecture a file; ``vaevq-med adopt`` writes their checkpoints."""
