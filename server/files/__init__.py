"""Files that clients sent for later use, whole or in parts, and what they are together."""
