"""Threads of a load, and how they are cancelled."""
