"""The commands of ``vaevq-med``, one file each."""
