"""The carriers of an additive vector, one a file: where the weights hold it."""
