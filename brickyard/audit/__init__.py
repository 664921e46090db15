"""Methods that look at a model and its changes and report; they train nothing."""
