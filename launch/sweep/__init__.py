"""The cases of an experiment's ``sweep()``: which there are, how far they are, how long they take, running them."""
