"""Selection: the smallest artifact whose loss, measured, is within what the user allows."""
