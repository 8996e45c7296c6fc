"""Telling others of events: one courier per sink, from the store to a webhook or a broker, at least once."""
