"""Channels: which of them sits where in a tensor, and the values of constant ones."""
