"""Running a model on text: with all of its weights in memory, or with one layer's at a time."""
