"""What any long command needs: ranks, devices, signals, checkpoints, a run's folder, what is printed."""
