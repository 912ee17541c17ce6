"""What every room uses and no image is known to: errors, resources, jobs, folders."""
