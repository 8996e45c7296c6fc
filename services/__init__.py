"""Streams kept alive for others."""
