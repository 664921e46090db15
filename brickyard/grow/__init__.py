"""Methods that let a model grow: weights or modules that are not there at first train later."""
