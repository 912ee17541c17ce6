"""What knows of no image and what every room uses: errors, files, folders, jobs, options, components, resources."""
