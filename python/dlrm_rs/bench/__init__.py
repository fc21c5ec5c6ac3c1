"""`dlrm-rs bench`: lookups, quantization and training steps timed beside every other library that is installed.

A *side* is a library with tables of its own that hold the same rows. A *use* is one way of calling it, an *environment*
the variables that its process starts with; a side counts at its best of both. All sides of a process take turns, and
every use is checked against float64 before it is timed. The *ceiling* is the time in which the engine touches the same
cache lines and does nothing else.
"""
