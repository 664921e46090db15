"""Methods that bound what a tuned model can tell of any one row that it was trained on."""
