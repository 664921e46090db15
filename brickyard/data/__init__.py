"""Steps over the rows of a data set: what to keep, in which mixture, in which order."""
