"""In which order the prior codes the indices of each kind of generator, and by which logits: a file a kind."""
