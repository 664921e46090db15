"""The small shared machinery on which every family stands."""
