"""Studies of downstream tasks: what is left for a diagnosis in volumes that were coded."""
