"""What every other package uses: configs, errors, files, stages, and child processes."""
