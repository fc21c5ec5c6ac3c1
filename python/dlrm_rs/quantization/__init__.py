"""Fewer bits for the rows of trained tables: what it costs, and how many bits each table needs."""
