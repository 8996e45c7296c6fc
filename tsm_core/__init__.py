"""Temporal Shift Module: tensors in, records out."""
