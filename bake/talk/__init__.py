"""Talking to models: one conversation, or two answers side by side."""
