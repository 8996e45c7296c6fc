"""Pixels from disks and cameras, tracks and training."""
