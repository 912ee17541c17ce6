"""Files of other people's tokenizers, read and written as checkpoints of this package; one kind of file a module."""
