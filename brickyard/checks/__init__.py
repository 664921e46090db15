"""Claims re-measured: the runner, and one file a method for claims that are not a plain inequality between arms."""
